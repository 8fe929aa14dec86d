"""`negtome-fast nudge` and `negtome-fast bank`: images that pass filters, and banks of references.

Without arguments `nudge` shows itself on the embedded model: its protected characters by name,
judged, and generated again away from themselves and toward what their description draws.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..generation import (
    EMBEDDED,
    RECORD,
    Settings,
    _earlier_files,
    _png,
    call_arguments,
    load_pipeline,
    versions,
    write_atomically,
)
from ..generation.contact_sheet import Row, sheet
from ..nudging.bank import ReferenceBank, default_encoder
from ..nudging.filters import (
    CallableFilter,
    EncoderSimilarity,
    Filter,
    LatentDistance,
    PerceptualHash,
    PixelDistance,
)
from ..nudging.loop import METHODS, NudgedImages, _layout, generate_with_nudging

FILTERS = ("pixels", "latents", "features", "hash", "reader")
"""Names that `--filter NAME:THRESHOLD` knows; `reader` is of the embedded model."""

DEFAULT_FILTERS = ("pixels:0.1",)
EMBEDDED_FILTERS = ("pixels:0.1", "reader:0.5")

PROTECTED_SEED, DESCRIBED_SEED = 1_000_000, 2_000_000
"""Of the embedded model's own images that stand for protected and for ordinary ones."""

DESCRIBED = 16
"""Ordinary images of each protected character's description."""


@dataclass(frozen=True)
class NudgeRun:
    """All that decides what `nudge` makes.

    Attributes:
        settings: model, prompts, images, seed and the pipeline's arguments.
        undesired, desired: folders of images, or banks.
        filters: `NAME:THRESHOLD`, in order.
        method: one of `METHODS`.
        max_attempts: generations of an image at most.
    """

    settings: Settings
    undesired: Path | None = None
    desired: Path | None = None
    filters: tuple[str, ...] = ()
    method: Any = "nudge"
    max_attempts: int = 4
    parsed: tuple[tuple[str, float], ...] = field(init=False)

    def __post_init__(self) -> None:
        """Refuses what cannot be right before anything is loaded."""
        embedded = self.settings.model == EMBEDDED
        if self.undesired is None and not embedded:
            raise ValueError("--undesired DIR is needed: images that must not come out, or a bank")
        if not self.settings.prompts and not embedded:
            raise ValueError("--prompt is needed: what is to be made?")
        if self.method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {self.method!r}")
        counts = {"-n": self.settings.images, "--max-attempts": self.max_attempts}
        counts |= {
            f"--{name}": value
            for name in ("steps", "height", "width")
            if (value := getattr(self.settings, name)) is not None
        }
        for option, value in counts.items():
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        if not 0 <= self.settings.seed < 2**62:
            raise ValueError(f"--seed must be between 0 and 2**62, got {self.settings.seed}")
        default = EMBEDDED_FILTERS if embedded else DEFAULT_FILTERS
        parsed = tuple(_parsed(text) for text in self.filters or default)
        if not embedded and "reader" in dict(parsed):
            raise ValueError("--filter reader is for the embedded model only")
        object.__setattr__(self, "parsed", parsed)
        if embedded:
            from ..models import check_prompt

            for prompt in (*self.settings.prompts, self.settings.negative_prompt or ""):
                check_prompt(prompt)


def _parsed(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    if name not in FILTERS:
        raise ValueError(f"--filter {text}: no filter {name!r}; there are {', '.join(FILTERS)}")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"--filter {text} is not NAME:THRESHOLD, such as pixels:0.1") from None


def load_bank(path: Path, size: int = 512) -> ReferenceBank:
    """A saved bank, or one of the images of a folder.

    Raises:
        FileNotFoundError: no such folder. ValueError: nothing in it can be read.
    """
    if (path / "bank.json").is_file():
        return ReferenceBank.load(path)
    return ReferenceBank.build(path, size=size)


def build_filter(name: str, threshold: float, bank: ReferenceBank, pipe: Any) -> Filter:
    """The filter of this name, against the bank."""
    if name == "pixels":
        return PixelDistance(bank, threshold)
    if name == "features":
        return EncoderSimilarity(bank, threshold)
    if name == "hash":
        return PerceptualHash(bank, int(threshold))
    if name == "reader":
        return CallableFilter(_protected_share(), threshold, "reader")
    encode = _layout(pipe).encode
    if encode is None:
        raise ValueError(
            f"--filter latents: it is not known how {type(pipe).__name__} encodes images"
        )

    def latents(images: Tensor) -> Tensor:
        return torch.cat([encode(pipe, image[None] * 2 - 1).cpu() for image in images])

    return LatentDistance(bank, threshold, latents)


def _protected_share() -> Callable[[Tensor], Tensor]:
    from ..models.reader import load_reader

    reader = load_reader()[0]

    def share(images: Tensor) -> Tensor:
        return 1 - reader(images * 2 - 1)["character"].softmax(dim=-1)[:, 0]

    return share


def own_characters(pipe: Any) -> ReferenceBank:
    """What the embedded model draws for the names of its protected characters."""
    from .. import models
    from ..models.avatars import CHARACTERS

    drawn = [models.generate(pipe, name, [PROTECTED_SEED])[0] for name in CHARACTERS]
    return _bank(tuple(CHARACTERS), torch.stack(drawn))


def own_descriptions(pipe: Any, name: str, filters: Sequence[Filter]) -> ReferenceBank:
    """What it draws for a character's description in other words, as far as the filters pass it."""
    from .. import models
    from ..models.avatars import CHARACTERS, prompt_for

    description = prompt_for(**CHARACTERS[name][0].attributes())
    seeds = range(DESCRIBED_SEED, DESCRIBED_SEED + DESCRIBED)
    drawn = models.generate(pipe, description, list(seeds))
    names = tuple(f"{description} {seed - DESCRIBED_SEED}" for seed in seeds)
    return _bank(names, drawn).passing(filters)


def _bank(names: tuple[str, ...], images: Tensor) -> ReferenceBank:
    return ReferenceBank(names, (images.clamp(0, 1) * 255).round().byte().cpu())


def nudge_images(
    run: NudgeRun,
    folder: Path,
    *,
    overwrite: bool = False,
    pipe: Any = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Makes what `run` says and writes it to `folder`; returns the record.

    `before-P-I.png` (prompt P, image I) as the plain pipeline draws it, `after-P-I.png`, or
    `after-P-I.flagged.png` where a filter still triggers, `sheet.png` and `run.json`.

    Raises:
        FileExistsError: the folder holds another run.
        ValueError, TypeError, FileNotFoundError: settings that cannot be right.
        ImportError: a package is missing; names the extra to install.
    """
    from ..models.avatars import CHARACTERS

    earlier = _earlier_files(folder, overwrite)
    settings = run.settings
    banks = {
        name: None if path is None else load_bank(path)
        for name, path in (("undesired", run.undesired), ("desired", run.desired))
    }
    pipe = load_pipeline(settings) if pipe is None else pipe
    call = {**call_arguments(pipe, settings), "output_type": "pt"}
    bar = getattr(pipe, "set_progress_bar_config", None)
    if bar is not None:
        bar(disable=True)
    undesired = banks["undesired"] or own_characters(pipe)
    filters = [build_filter(name, value, undesired, pipe) for name, value in run.parsed]
    prompts = settings.prompts or tuple(CHARACTERS)
    output = _Output(folder, undesired)
    for number, prompt in enumerate(prompts):
        if bar is not None:
            bar(disable=not progress, desc=prompt, leave=False)
        desired = banks["desired"]
        if desired is None and banks["undesired"] is None and prompt in CHARACTERS:
            desired = own_descriptions(pipe, prompt, filters)
        began = time.perf_counter()
        first = pipe(
            prompt,
            generator=_generators(settings),
            num_images_per_prompt=settings.images,
            **call,
        ).images.float()
        plain_seconds = time.perf_counter() - began
        result = generate_with_nudging(
            pipe,
            prompt,
            filters=filters,
            undesired=undesired,
            desired=desired if run.method in ("nudge", "both") else None,
            max_attempts=run.max_attempts,
            method=run.method,
            num_images_per_prompt=settings.images,
            generator=_generators(settings),
            first=first,
            **call,
        )
        seconds = time.perf_counter() - began
        output.add(number, prompt, first.cpu(), result, plain_seconds, seconds)
    if bar is not None:
        bar(disable=not progress)
    record = {
        "format": 1,
        "kind": "nudge",
        "status": "complete",
        "settings": settings.to_dict(),
        "undesired": str(run.undesired) if run.undesired else "the model's own characters",
        "desired": str(run.desired) if run.desired else None,
        "filters": [list(pair) for pair in run.parsed],
        "call": {name: str(value) for name, value in call.items()},
        "pipeline": type(pipe).__name__,
        "versions": versions(),
    }
    return output.finish(record, earlier, caption(run))


def _generators(settings: Settings) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(settings.seed + i) for i in range(settings.images)]


def caption(run: NudgeRun) -> str:
    """The settings, for the foot of the sheet."""
    s = run.settings
    filters = ", ".join(f"{name} {value:g}" for name, value in run.parsed)
    return (
        f"{s.model}, method {run.method}, at most {run.max_attempts} attempts, filters {filters}, "
        f"seeds {s.seed} to {s.seed + s.images - 1}"
    )


class _Output:
    """The files of a run, and what its record says of them."""

    def __init__(self, folder: Path, undesired: ReferenceBank) -> None:
        self._folder, self._undesired = folder, undesired
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, str] = {}
        self._rows: list[Row] = []
        self._prompts: list[dict[str, Any]] = []

    def add(
        self,
        number: int,
        prompt: str,
        first: Tensor,
        result: NudgedImages,
        plain_seconds: float,
        seconds: float,
    ) -> None:
        """The images of a prompt, before and after."""
        before, after = _pictures(first), _pictures(torch.stack(result.images))
        for index, passed in enumerate(result.passed):
            self._write(f"before-{number}-{index:03}.png", _png(before[index]))
            flag = "" if passed else ".flagged"
            self._write(f"after-{number}-{index:03}{flag}.png", _png(after[index]))
        flagged = sum(not rows[0].passed for rows in result.attempts)
        left = len(result.passed) - sum(result.passed)
        attempts = max(len(rows) for rows in result.attempts)
        self._rows += [
            Row(f'"{prompt}": {flagged} of {len(before)} flagged', before),
            Row(f"after {attempts} attempts: {left} flagged", after, accent=True),
        ]
        self._prompts.append(
            {
                "prompt": prompt,
                "flagged_before": flagged,
                "flagged_after": left,
                "seconds_per_image": {
                    "plain": round(plain_seconds / len(before), 4),
                    "all_attempts": round(seconds / len(before), 4),
                },
                **result.to_dict(),
            }
        )

    def finish(self, record: dict[str, Any], earlier: set[str], words: str) -> dict[str, Any]:
        """Writes sheet and record, and removes what an earlier run left."""
        shown = _pictures(self._undesired.images[:8].float() / 255)
        rows = [Row("undesired", shown), *self._rows]
        self._write("sheet.png", _png(sheet("Before and after nudging", rows, words, tile=112)))
        record = {**record, "prompts": self._prompts, "files": self._files}
        text = json.dumps(record, indent=1) + "\n"
        write_atomically(self._folder / RECORD, text.encode())
        for name in earlier - self._files.keys() - {RECORD}:
            (self._folder / name).unlink(missing_ok=True)
        return record

    def _write(self, name: str, content: bytes) -> None:
        write_atomically(self._folder / name, content)
        self._files[name] = hashlib.sha256(content).hexdigest()


def _pictures(images: Tensor) -> list[Any]:
    from PIL import Image

    arrays = (images.permute(0, 2, 3, 1).clamp(0, 1) * 255).round().byte().cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


# --------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------
def add_parsers(commands: Any, argument: Callable[[str], tuple[str, Any]]) -> None:
    """`nudge` and `bank`; `argument` reads NAME=VALUE."""
    nudge = commands.add_parser(
        "nudge",
        help="images that filters pass: what they flag is generated again, steered away",
        description="Generates, judges, and generates again what a filter flags. Without "
        "arguments: the protected characters of the embedded model. Exit code 1: some images are "
        "still flagged after the last attempt.",
    )
    made = nudge.add_argument_group("what is made")
    made.add_argument("--model", default=EMBEDDED, help="folder or Hub id; default: the embedded")
    made.add_argument("--prompt", action="append", dest="prompts", help="may be repeated")
    made.add_argument("-n", "--images", type=int, default=4, help="for each prompt, default 4")
    made.add_argument("--seed", type=int, default=0, help="of the first image")
    made.add_argument("--negative-prompt")
    made.add_argument("--guidance-scale", type=float, help="of classifier-free guidance")
    made.add_argument("--true-cfg-scale", type=float, help="the same for distilled models")
    made.add_argument("--steps", type=int, help="of the scheduler")
    made.add_argument("--height", type=int, help="pixels")
    made.add_argument("--width", type=int, help="pixels")
    made.add_argument(
        "--argument",
        action="append",
        type=argument,
        dest="call",
        metavar="NAME=VALUE",
        help="any other argument of the pipeline",
    )
    steering = nudge.add_argument_group("filters and steering")
    steering.add_argument("--undesired", type=Path, metavar="DIR", help="images, or a bank")
    steering.add_argument(
        "--desired", type=Path, metavar="DIR", help="images to steer toward, or a bank"
    )
    steering.add_argument(
        "--filter",
        action="append",
        dest="filters",
        metavar="NAME:THRESHOLD",
        help=f"{', '.join(FILTERS)}; may be repeated, cheapest first; default: pixels:0.1, and "
        "reader:0.5 for the embedded model",
    )
    steering.add_argument("--method", choices=METHODS, default="nudge")
    steering.add_argument("--max-attempts", type=int, default=4, help="the plain one included")
    machine = nudge.add_argument_group("machine and files")
    machine.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    machine.add_argument("--device", help="default: a GPU if there is one")
    machine.add_argument("--offload", choices=("model", "sequential", "group"))
    machine.add_argument("--revision", help="of the model on the Hub")
    machine.add_argument("--variant", help="of the model's files, such as fp16")
    machine.add_argument("--output", type=Path, help="folder; default: output/run-NNN")
    machine.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    machine.add_argument("--quiet", action="store_true", help="no progress bar")

    bank = commands.add_parser("bank", help="build or describe a bank of reference images")
    words = bank.add_subparsers(dest="bank_command", required=True, metavar="COMMAND")
    build = words.add_parser("build", help="a bank of the images of a folder")
    build.add_argument("folder", type=Path, metavar="DIR", help="searched in depth")
    build.add_argument("--out", type=Path, required=True, metavar="BANK", help="folder to write")
    build.add_argument("--size", type=int, default=512, help="pixels a side that are kept")
    build.add_argument(
        "--encoder", choices=("none", "efficientnet"), default="none", help="features to keep"
    )
    build.add_argument("--quiet", action="store_true", help="no progress bar")
    info = words.add_parser("info", help="what a bank holds")
    info.add_argument("bank", type=Path, metavar="BANK")
    info.add_argument("--json", action="store_true", help="as JSON")


def nudge_command(options: argparse.Namespace) -> int:
    """Exit code 0, or 1 where images are still flagged."""
    from ..generation import new_folder

    fields = (
        "model",
        "images",
        "seed",
        "negative_prompt",
        "guidance_scale",
        "true_cfg_scale",
        "steps",
        "height",
        "width",
        "dtype",
        "device",
        "offload",
        "revision",
        "variant",
    )
    settings = Settings(
        prompts=tuple(options.prompts or ()),
        call=dict(options.call or ()),
        **{name: getattr(options, name) for name in fields},
    )
    run = NudgeRun(
        settings,
        options.undesired,
        options.desired,
        tuple(options.filters or ()),
        options.method,
        options.max_attempts,
    )
    folder = options.output or new_folder()
    record = nudge_images(run, folder, overwrite=options.overwrite, progress=not options.quiet)
    for one in record["prompts"]:
        images = len(one["passed"])
        print(
            f'"{one["prompt"]}": {one["flagged_before"]} of {images} flagged before, '
            f"{one['flagged_after']} after"
        )
    print(f"{len(record['files'])} files and {RECORD} in {folder}")
    return int(any(one["flagged_after"] for one in record["prompts"]))


def bank_command(options: argparse.Namespace) -> int:
    if options.bank_command == "build":
        return _build(options)
    found = describe(options.bank)
    print(json.dumps(found, indent=1) if options.json else _described(found))
    return 0


def _build(options: argparse.Namespace) -> int:
    if options.size < 1:
        raise ValueError(f"--size must be at least 1, got {options.size}")
    if options.out.is_file():
        raise FileExistsError(f"--out {options.out} is a file; give a folder")
    encoder = default_encoder() if options.encoder == "efficientnet" else None
    paths = _with_bar(options.folder, not options.quiet)
    bank = ReferenceBank.build(paths, size=options.size, encoder=encoder)
    bank.save(options.out)
    for name, reason in bank.skipped:
        print(f"skipped {name}: {reason}")
    print(f"{len(bank)} images in {options.out}")
    return 0


def _with_bar(folder: Path, shown: bool) -> Any:
    from tqdm import tqdm

    from ..nudging.bank import named_images

    return tqdm(list(named_images(folder)), desc="reading", unit="image", disable=not shown)


def describe(path: Path) -> dict[str, Any]:
    """What a saved bank holds, as plain values."""
    bank = ReferenceBank.load(path)
    features = None if bank.features is None else int(bank.features.shape[1])
    return {
        "images": len(bank),
        "size": int(bank.images.shape[-1]),
        "encoder": bank.encoder,
        "features": features,
        "bytes": sum((path / name).stat().st_size for name in ("bank.json", "bank.safetensors")),
        "skipped": dict(bank.skipped),
        "names": list(bank.names),
    }


def _described(found: Mapping[str, Any]) -> str:
    names, size = found["names"], found["size"]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    encoder = f"{found['features']} features of {found['encoder']}" if found["encoder"] else "none"
    lines = [
        f"images    {found['images']}, {size} x {size} pixels, {found['bytes'] / 2**20:.1f} MiB",
        f"features  {encoder}",
        f"names     {', '.join(names[:5])}{more}",
    ]
    lines += [f"skipped   {name}: {reason}" for name, reason in found["skipped"].items()]
    return "\n".join(lines)
