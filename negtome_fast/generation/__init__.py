"""`negtome-fast generate`: guided images or videos of any diffusers model, and a record of the run.

`Settings` says what is made; `generate` makes it and writes the images, a labelled sheet and
`run.json`, from which `Settings.from_record` repeats the run. Files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import platform
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import NegToMeConfig
from ..files import write_atomically
from .contact_sheet import Row, sheet

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipelines.references import Reference

EMBEDDED = "tiny-flux-avatars"
"""Name of the model that is part of the package."""

RECORD = "run.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OFFLOADS = ("model", "sequential", "group")
_FAMILY = ("model", "preset")  # settings that decide the defaults of the guidance
_PACKAGES = ("negtome-fast", "torch", "triton", "diffusers", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class Application:
    """What a run is for: settings that the caller's own go before.

    Attributes:
        purpose: a line for users.
        guidance: fields of `NegToMeConfig`, on top of the authors' for the model's family.
        embedded: further ones for the embedded model, which were tuned on it.
        references: whether it needs images from outside (True), has no use for them (False), or
            makes its own from drafts of each image ("drafts").
    """

    purpose: str
    guidance: Mapping[str, Any]
    embedded: Mapping[str, Any]
    references: bool | str


APPLICATIONS: dict[str, Application] = {
    "diversity": Application(
        "every image is pushed away from all others of its prompt",
        {"reference": "others"},
        {"alpha": 0.5, "threshold": 0.65, "t_start": 1000, "t_end": 750},
        references=False,
    ),
    "avoid": Application(
        "away from a protected image",
        {"alpha": 0.9},
        {"alpha": 3.0, "threshold": 0.2, "t_start": 1000, "t_end": 400},
        references=True,
    ),
    "style": Application(
        "away from the style of an image",
        {"alpha": 0.9},
        {"alpha": 1.5, "threshold": 0.65, "t_start": 1000, "t_end": 700},
        references=True,
    ),
    "sharpen": Application(
        "every image away from a blurred draft of itself",
        {"alpha": 0.5},
        {"alpha": 0.3, "threshold": 0.65, "t_start": 700, "t_end": 100},
        references="drafts",
    ),
    "interpolate": Application(
        "toward an image",
        {"alpha": -0.4},
        {"alpha": -0.6, "threshold": 0.3, "t_start": 1000, "t_end": 700},
        references=True,
    ),
}


@dataclass(frozen=True)
class ReferenceFile:
    """An image from outside the batch, as a file; see `negtome_fast.Reference`."""

    image: str
    mask: str | None = None
    alpha: float | None = None
    threshold: float | None = None
    noise: bool = True

    def load(self) -> Reference:
        from ..pipelines.references import Reference

        return Reference(self.image, self.mask, self.alpha, self.threshold, self.noise)


@dataclass(frozen=True)
class Settings:
    """All that decides what a run makes. None leaves a value to the pipeline.

    Attributes:
        prompts: one or several; every prompt has a batch of its own.
        model: a folder, the id of a Hub repository, or `EMBEDDED`.
        preset: a name of `APPLICATIONS`; None guides by the authors' settings.
        images: for each prompt; image i starts from the noise of seed + i.
        guidance_scale: of classifier-free guidance: the pipeline's `true_cfg_scale` where its
            model is not distilled, else its `guidance_scale`.
        true_cfg_scale: the pipeline's argument of this name, for distilled models.
        steps: of the scheduler.
        frames, fps: of a video.
        references: images from outside the batch; without any, the batch guides itself.
        blur: radius of the drafts' blur for `preset="sharpen"`, in 64ths of the longer side.
        guidance: fields of `NegToMeConfig`.
        call: further arguments of the pipeline's call.
        compare: also make the images without guidance, from the same seeds.
        dtype: a name of `DTYPES`; None is bfloat16 on a GPU, else float32.
        offload: one of `OFFLOADS`, diffusers' ways to keep a model partly in the host's memory.
    """

    prompts: tuple[str, ...] = ()
    model: str = EMBEDDED
    preset: str | None = None
    images: int = 4
    seed: int = 0
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: int = 16
    references: tuple[ReferenceFile, ...] = ()
    blur: float = 2.0
    guidance: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    compare: bool = False
    dtype: str | None = None
    device: str | None = None
    offload: str | None = None
    vae_tiling: bool = False
    revision: str | None = None
    variant: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_record(cls, path: Path, **changes: Any) -> Settings:
        """The settings of a run, with some replaced; references are found beside the record.

        The whole configuration is the run's, so that it repeats whatever the presets have become;
        with another model or preset only what the caller of that run chose is kept.

        Args:
            path: `run.json`, or the folder that holds it.
            changes: fields of `Settings`; `guidance` and `call` are added to those of the run.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is not the record of a run.
        """
        path = path / RECORD if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"there is no record of a run at {path}")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            values = dict(record["settings"])
            files = [ReferenceFile(**entry) for entry in values.pop("references")]
            values["prompts"] = tuple(values["prompts"])
            settings = cls(**values)
            config = NegToMeConfig.from_dict(record["config"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not the record of a run of negtome-fast generate"
            ) from error
        references = tuple(
            replace(
                entry,
                image=str(path.parent / entry.image),
                mask=None if entry.mask is None else str(path.parent / entry.mask),
            )
            for entry in files
        )
        same = all(changes.get(n, getattr(settings, n)) == getattr(settings, n) for n in _FAMILY)
        guidance = {**(config.to_dict() if same else settings.guidance)}
        chosen = changes.pop("guidance", {})
        if {"t_start", "t_end"} & chosen.keys():
            guidance["steps"] = None
        return replace(
            settings,
            **{
                "references": references,
                **changes,
                "guidance": {**guidance, **chosen},
                "call": {**settings.call, **changes.pop("call", {})},
            },
        )

    def check(self) -> None:
        """Refuses what cannot be right before anything is loaded.

        Raises:
            ValueError, TypeError: with the option to change.
            FileNotFoundError: the file of a reference or mask does not exist.
        """
        if not self.prompts:
            raise ValueError("--prompt is needed: what is to be made?")
        if any(not prompt.strip() for prompt in self.prompts) and self.model != EMBEDDED:
            raise ValueError("--prompt is empty")
        for name in ("images", "steps", "height", "width", "frames", "fps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be between 0 and 2**63, got {self.seed}")
        if self.preset is not None and self.preset not in APPLICATIONS:
            raise ValueError(f"no preset {self.preset!r}; there are {', '.join(APPLICATIONS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.offload is not None and self.offload not in OFFLOADS:
            raise ValueError(f"--offload must be one of {', '.join(OFFLOADS)}")
        NegToMeConfig().with_overrides(**self._overrides())
        self._check_references()
        if self.model == EMBEDDED:
            from ..models import check_prompt

            for prompt in (*self.prompts, self.negative_prompt or ""):
                check_prompt(prompt)

    def _check_references(self) -> None:
        wanted = APPLICATIONS[self.preset].references if self.preset else None
        if wanted is True and not self.references:
            raise ValueError(f"--preset {self.preset} needs --reference IMAGE")
        if wanted in (False, "drafts") and self.references:
            raise ValueError(f"--preset {self.preset} has no use for --reference")
        alphas = [self._overrides().get("alpha"), *(r.alpha for r in self.references)]
        if self.preset == "interpolate" and any(a is not None and a >= 0 for a in alphas):
            raise ValueError("--preset interpolate pulls toward the image: alpha must be negative")
        for reference in self.references:
            reference.load().load()
        if wanted != "drafts" and not self.references and self.images < 2:
            raise ValueError(
                "a single image has no other to differ from: use -n 2 or more, or --reference IMAGE"
            )

    def _overrides(self) -> dict[str, Any]:
        """The fields of the configuration that differ from the authors' for the family."""
        chosen: dict[str, Any] = {}
        if self.preset is not None:
            application = APPLICATIONS[self.preset]
            chosen.update(application.guidance)
            if self.model == EMBEDDED:
                chosen.update(application.embedded)
        if {"t_start", "t_end"} & self.guidance.keys():
            chosen["steps"] = None
        return {**chosen, **self.guidance}


@dataclass(frozen=True)
class Result:
    """What a run made: the images, or the middle frames of videos, by prompt; files; its record."""

    folder: Path
    guided: list[list[Image]]
    plain: list[list[Image]]
    record: dict[str, Any]


def new_folder(parent: Path = Path("output")) -> Path:
    """The first of `run-001`, `run-002`, ... in `parent` that does not exist."""
    taken = {path.name for path in parent.glob("run-*")} if parent.is_dir() else set()
    number = 1
    while f"run-{number:03}" in taken:
        number += 1
    return parent / f"run-{number:03}"


def generate(
    settings: Settings,
    folder: Path,
    *,
    overwrite: bool = False,
    pipe: Any = None,
    progress: bool = True,
) -> Result:
    """Makes what `settings` say and writes it to `folder`.

    `guided-P-I.png` (prompt P, image I; `.mp4` or `.gif` for videos), with `compare` also
    `plain-P-I.png`, copies of the references, `sheet.png`, and `run.json`, which is written first
    and last. What is finished when the run is interrupted or fails is kept, and so marked.

    Args:
        folder: made where it does not exist.
        overwrite: replace another run there.
        pipe: use this pipeline instead of loading `settings.model`.
        progress: show a progress bar.

    Raises:
        FileExistsError: the folder holds another run.
        ValueError, TypeError, FileNotFoundError: settings that cannot be right, for this pipeline
            or at all, before anything is written.
        ImportError: a package is missing; names the extra to install.
    """
    settings.check()
    earlier = _earlier_files(folder, overwrite)
    if pipe is None:
        pipe = load_pipeline(settings)
    call = call_arguments(pipe, settings)
    config = configuration(pipe, settings)
    run = _Run(settings, folder, pipe, call, config, progress)
    with run.recording():
        for number, prompt in enumerate(settings.prompts):
            run.one_prompt(number, prompt)
        run.finish()
    for name in earlier - run.files.keys() - {RECORD}:
        (folder / name).unlink(missing_ok=True)
    return Result(folder, run.guided, run.plain, run.record)


def load_pipeline(settings: Settings) -> Any:
    """The pipeline of `settings.model` on its device, with its ways to save memory.

    Raises:
        ValueError: there is no such model, it cannot be loaded, or an option does not fit it.
        ImportError: diffusers is missing; names the extra to install.
    """
    device = settings.device or _default_device()
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"--device {device} is not a device of torch") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no such device here")
    if settings.offload in ("model", "sequential") and kind == "cpu":
        raise ValueError(f"--offload {settings.offload} needs a GPU; on the CPU leave it out")
    dtype = DTYPES[settings.dtype or ("bfloat16" if kind == "cuda" else "float32")]
    if settings.model == EMBEDDED:
        from .. import models

        pipe = models.load_pipeline("cpu", dtype)
    else:
        pipe = _from_pretrained(settings, dtype)
    if settings.vae_tiling:
        tiling = getattr(getattr(pipe, "vae", None), "enable_tiling", None)
        if tiling is None:
            raise ValueError(f"--vae-tiling: {type(pipe).__name__} has no VAE that can be tiled")
        tiling()
    if settings.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif settings.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif settings.offload == "group":
        if not hasattr(pipe, "enable_group_offload"):
            raise ValueError("--offload group needs a newer diffusers; use --offload model")
        pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")
    else:
        pipe.to(device)
    return pipe


def _from_pretrained(settings: Settings, dtype: torch.dtype) -> Any:
    path = Path(settings.model).expanduser()
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"--model {settings.model}: the folder has no model_index.json of diffusers"
        )
    if path.is_file():
        raise ValueError(
            f"--model {settings.model} is a file; give a folder in diffusers' format or a Hub id"
        )
    if not path.exists() and (settings.model.count("/") != 1 or settings.model[0] in "./~"):
        raise FileNotFoundError(
            f"there is no model at {settings.model}; give a folder, a Hub id such as owner/name, "
            f"or {EMBEDDED}"
        )
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError(
            "generate needs the extra 'diffusers': pip install 'negtome-fast[diffusers]'"
        ) from error
    options = {"revision": settings.revision, "variant": settings.variant}
    given = {name: value for name, value in options.items() if value is not None}
    where = str(path) if path.exists() else settings.model
    try:
        with warnings.catch_warnings():
            # The new name of the argument, dtype, is unknown to the oldest supported diffusers.
            warnings.filterwarnings("ignore", category=FutureWarning)
            return DiffusionPipeline.from_pretrained(where, torch_dtype=dtype, **given)
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"the model {settings.model} cannot be loaded: {reason}") from error


def call_arguments(pipe: Any, settings: Settings) -> dict[str, Any]:
    """The arguments of the pipeline's call, but for prompt, number of images and random numbers.

    Raises:
        ValueError: the pipeline is not one from text, or has no such argument.
    """
    name, known = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    for needed in ("prompt", "generator"):
        if needed not in known:
            raise ValueError(f"{name} takes no {needed}, so it does not generate from text alone")
    for other in ("image", "video", "control_image", "mask_image"):
        if other in known and known[other].default is inspect.Parameter.empty:
            raise ValueError(f"{name} needs an {other} to start from; use a text-to-image pipeline")
    embedded = settings.model == EMBEDDED
    arguments: dict[str, Any] = {}

    def take(option: str, argument: str, value: Any) -> None:
        if value is None:
            return
        if argument not in known:
            raise ValueError(f"{option}: {name} has no {argument}")
        arguments[argument] = value

    if embedded:
        from .. import models
        from ..models.avatars import IMAGE_SIZE

        arguments["max_sequence_length"] = models.TEXT_LENGTH
        arguments["num_inference_steps"] = models.STEPS
        arguments["height"] = arguments["width"] = IMAGE_SIZE
        arguments["true_cfg_scale"] = models.GUIDANCE_SCALE
    model = getattr(pipe, "transformer", None)
    distilled = bool(getattr(getattr(model, "config", None), "guidance_embeds", False))
    true_cfg = "true_cfg_scale" in known
    scale_of = "true_cfg_scale" if true_cfg and not distilled else "guidance_scale"
    take("--guidance-scale", scale_of, settings.guidance_scale)
    take("--true-cfg-scale", "true_cfg_scale", settings.true_cfg_scale)
    take("--negative-prompt", "negative_prompt", settings.negative_prompt)
    if arguments.get("true_cfg_scale", 1) > 1:
        arguments.setdefault("negative_prompt", "")
    elif true_cfg and distilled and settings.negative_prompt is not None:
        raise ValueError(
            f"--negative-prompt has no effect on a distilled {name} without --true-cfg-scale "
            "above 1 (which doubles the time)"
        )
    take("--steps", "num_inference_steps", settings.steps)
    for size in ("height", "width"):
        take(f"--{size}", size, getattr(settings, size))
    take("--frames", "num_frames", settings.frames)
    for argument, value in settings.call.items():
        take(f"--argument {argument}", argument, value)
    for reserved in ("prompt", "generator", "num_images_per_prompt", "output_type"):
        if reserved in settings.call:
            raise ValueError(f"--argument {reserved}: the command sets it itself")
    if "output_type" in known:
        arguments["output_type"] = "pil"
    return arguments


def take_guidance(values: dict[str, Any]) -> dict[str, Any]:
    """Takes the fields of `NegToMeConfig` out of options of the command line, by name.

    Raises:
        ValueError: two windows.
    """
    window = values.pop("steps_window", None)
    if window is not None and values.keys() & {"t_start", "t_end"}:
        raise ValueError("--steps-window and --t-start or --t-end are two ways to say one thing")
    # --steps is the scheduler's; the configuration's window of that name is --steps-window.
    names = [f.name for f in fields(NegToMeConfig) if f.name not in ("steps", "seed")]
    guidance = {name: values.pop(name) for name in names if name in values}
    if window is not None:
        guidance["steps"] = tuple(window)
    return guidance


def draw(
    pipe: Any,
    call: Mapping[str, Any],
    prompt: str,
    seeds: Sequence[int],
    label: str | None = None,
) -> list[Any]:
    """One call of the pipeline: PIL images, or frames of videos, one for each seed.

    Args:
        pipe: a pipeline that generates from text.
        call: its other arguments, of `call_arguments`.
        prompt: of all of them.
        seeds: each has a generator of its own.
        label: of the pipeline's progress bar; None shows none.
    """
    arguments = dict(call)
    known = inspect.signature(type(pipe).__call__).parameters
    each = ("num_images_per_prompt", "num_videos_per_prompt")
    several = next((name for name in each if name in known), None)
    arguments["prompt"] = prompt
    if several is not None:
        arguments[several] = len(seeds)
    elif len(seeds) > 1:
        arguments["prompt"] = [prompt] * len(seeds)
        if isinstance(arguments.get("negative_prompt"), str):
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(seeds)
    arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(desc=label, disable=label is None, leave=False)
    output = pipe(**arguments)
    made = output.frames if hasattr(output, "frames") else output.images
    return list(made)


def configuration(pipe: Any, settings: Settings) -> NegToMeConfig:
    """The whole configuration: the authors' for the family, the preset's and the caller's."""
    from ..pipelines import negtome_guidance

    with negtome_guidance(pipe, **settings._overrides()) as handle:
        return handle.config


class _Run:
    """A run that is going on, and what of it is finished."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        pipe: Any,
        call: dict[str, Any],
        config: NegToMeConfig,
        progress: bool,
    ) -> None:
        self.settings, self.folder, self.pipe, self.call = settings, folder, pipe, call
        self.config, self.progress = config, progress
        self.files: dict[str, str] = {}  # name -> sha256
        self.guided: list[list[Image]] = []
        self.plain: list[list[Image]] = []
        self.record: dict[str, Any] = {}
        self._summaries: list[dict[str, Any]] = []
        self._warnings: list[str] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Writes the record before and after, also after an error or an interrupt."""
        self.folder.mkdir(parents=True, exist_ok=True)
        copied = [self._copy(i, entry) for i, entry in enumerate(self.settings.references)]
        self.record = {
            "format": 1,
            "status": "running",
            "settings": {
                **self.settings.to_dict(),
                "references": [asdict(entry) for entry in copied],
            },
            "config": self.config.to_dict(),
            "call": {name: _plain(value) for name, value in self.call.items()},
            "seeds": [self.settings.seed + i for i in range(self.settings.images)],
            "pipeline": type(self.pipe).__name__,
            "device": str(getattr(self.pipe, "_execution_device", "unknown")),
            "versions": versions(),
        }
        self._write_record()
        try:
            with warnings.catch_warnings():
                real, seen = warnings.showwarning, self._warnings

                def show(message: Any, *args: Any, **kwargs: Any) -> None:
                    if isinstance(message, UserWarning) and str(message) not in seen:
                        seen.append(str(message))
                    real(message, *args, **kwargs)

                warnings.showwarning = show
                yield
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            self.record["status"] = "interrupted" if stopped else "failed"
            self._write_record()
            raise

    def one_prompt(self, number: int, prompt: str) -> None:
        """Draws, and saves what is drawn as soon as it is."""
        drafts = self.settings.preset == "sharpen"
        seeds = [self.settings.seed + i for i in range(self.settings.images)]
        if self.settings.compare or drafts:
            made = self._draw(prompt, seeds, "without guidance")
            self._save("plain", number, 0, made)
            self.plain.append([_still(item) for item in made])
        self.guided.append([])
        if not drafts:
            references = [entry.load() for entry in self.settings.references] or None
            self._guided_batch(number, prompt, seeds, 0, references)
            return
        from ..pipelines.references import Reference

        for place, seed in enumerate(seeds):
            draft = [_blurred(frame, self.settings.blur) for frame in _frames(made[place])]
            reference = [Reference(draft if len(draft) > 1 else draft[0])]
            self._guided_batch(number, prompt, [seed], place, reference)

    def _guided_batch(
        self,
        number: int,
        prompt: str,
        seeds: Sequence[int],
        place: int,
        references: Sequence[Reference] | None,
    ) -> None:
        from ..pipelines import negtome_guidance

        with negtome_guidance(self.pipe, self.config, reference=references) as handle:
            made = self._draw(prompt, seeds, "guided")
            self._summaries.append(handle.summary().to_dict())
        self._save("guided", number, place, made)
        self.guided[-1] += [_still(item) for item in made]

    def finish(self) -> None:
        """The sheet, and the record of a whole run."""
        picture = sheet(
            " | ".join(f'"{prompt}"' for prompt in self.settings.prompts),
            self._rows(),
            self.caption(),
        )
        self._write("sheet.png", _png(picture))
        self.record["status"] = "complete"
        self._write_record()

    def caption(self) -> str:
        c, s = self.config, self.settings
        window = f"t in [{c.t_end:g}, {c.t_start:g}]"
        if c.steps is not None:
            window = f"steps {c.steps[0]:g} to {c.steps[1]:g}"
        words = [s.model, f"preset {s.preset}" if s.preset else "no preset"]
        alphas = {r.alpha for r in s.references if r.alpha is not None}
        words += [f"alpha {', '.join(f'{a:g}' for a in alphas) or f'{c.alpha:g}'}"]
        words += [f"threshold {c.threshold:g}", window, f'matching "{c.matching}"']
        if not s.references and s.preset != "sharpen":
            words.append(f'reference "{c.reference}"')
        words.append(f"seeds {s.seed} to {s.seed + s.images - 1}")
        return ", ".join(words)

    def _rows(self) -> list[Row]:
        rows = reference_rows(self.settings.references)
        for number, guided in enumerate(self.guided):
            if self.plain:
                rows.append(Row("without guidance", self.plain[number]))
            rows.append(Row("with NegToMe, same seeds", guided, accent=True))
        return rows

    def _draw(self, prompt: str, seeds: Sequence[int], label: str) -> list[Any]:
        return draw(self.pipe, self.call, prompt, seeds, label if self.progress else None)

    def _save(self, kind: str, number: int, place: int, made: Sequence[Any]) -> None:
        for index, item in enumerate(made, place):
            name = f"{kind}-{number}-{index:03}"
            if _is_image(item):
                self._write(f"{name}.png", _png(item))
            else:
                suffix, content = encode_video(_frames(item), self.settings.fps)
                self._write(name + suffix, content)

    def _copy(self, number: int, entry: ReferenceFile) -> ReferenceFile:
        """The reference with its files beside the record, so that the folder is complete."""

        def copied(path: str | None, kind: str) -> str | None:
            if path is None or not Path(path).is_file():
                return path if path is None else str(Path(path).resolve())
            source = Path(path)
            name = f"{kind}-{number}{source.suffix.lower()}"
            self._write(name, source.read_bytes())
            return name

        image = copied(entry.image, "reference")
        return replace(entry, image=str(image), mask=copied(entry.mask, "mask"))

    def _write(self, name: str, content: bytes) -> None:
        write_atomically(self.folder / name, content)
        self.files[name] = hashlib.sha256(content).hexdigest()

    def _write_record(self) -> None:
        self.record["summaries"] = self._summaries
        self.record["warnings"] = self._warnings
        self.record["files"] = self.files
        text = json.dumps(self.record, indent=1) + "\n"
        write_atomically(self.folder / RECORD, text.encode())


def reference_rows(references: Sequence[ReferenceFile]) -> list[Row]:
    """Of a sheet: every reference that is an image, with its mask."""
    from PIL import Image

    rows = []
    for entry in references:
        if Path(entry.image).is_file():
            with Image.open(entry.image) as image:
                shown = [image.convert("RGB")]
            if entry.mask is not None and Path(entry.mask).is_file():
                with Image.open(entry.mask) as mask:
                    shown.append(mask.convert("RGB").resize(shown[0].size))
            rows.append(Row("reference" + (" and mask" if entry.mask else ""), shown))
    return rows


def versions() -> dict[str, str]:
    """Of Python and the packages that decide what an image looks like."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    from .. import __version__

    return {**found, "negtome-fast": __version__, "torch": torch.__version__}


def encode_video(frames: Sequence[Image], fps: int) -> tuple[str, bytes]:
    """(suffix, content): mp4 where ffmpeg is at hand, by itself or through imageio, else gif."""
    program = shutil.which("ffmpeg")
    if program is None and util.find_spec("imageio_ffmpeg") is not None:
        from imageio_ffmpeg import get_ffmpeg_exe

        program = get_ffmpeg_exe()
    if program is None:
        buffer = io.BytesIO()
        frames[0].save(
            buffer,
            "GIF",
            save_all=True,
            append_images=list(frames[1:]),
            duration=round(1000 / fps),
            loop=0,
        )
        return ".gif", buffer.getvalue()
    width, height = frames[0].size
    command = [program, "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", str(fps), "-i", "-", "-an"]
    # Players want 4:2:0, and that even sizes; an mp4 in a pipe has to be in fragments.
    command += ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p"]
    command += ["-movflags", "frag_keyframe+empty_moov", "-f", "mp4", "-"]
    raw = b"".join(frame.convert("RGB").tobytes() for frame in frames)
    done = subprocess.run(command, input=raw, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"ffmpeg failed: {done.stderr.decode(errors='replace').strip()}")
    return ".mp4", done.stdout


def _earlier_files(folder: Path, overwrite: bool) -> set[str]:
    """The files of the run that is in the folder."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--output {folder} is a file; give a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return set()
    record = folder / RECORD
    if not record.is_file():
        raise FileExistsError(
            f"--output {folder} holds files, but no run; choose another or an empty folder"
        )
    if not overwrite:
        raise FileExistsError(
            f"--output {folder} holds another run; choose another folder, or pass --overwrite"
        )
    try:
        files = json.loads(record.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return set()
    return {name for name in files if Path(name).name == name}


def _default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _is_image(item: Any) -> bool:
    from PIL.Image import Image

    return isinstance(item, Image)


def _frames(item: Any) -> list[Image]:
    """The frames of a video: PIL images, or an array or tensor (F, H, W, 3) in [0, 1]."""
    from PIL import Image

    if _is_image(item):
        return [item]
    frames = []
    for frame in item:
        if not _is_image(frame):
            values = torch.as_tensor(frame).float().clamp(0, 1) * 255
            frame = Image.fromarray(values.round().byte().cpu().numpy())
        frames.append(frame)
    return frames


def _still(item: Any) -> Image:
    frames = _frames(item)
    return frames[len(frames) // 2]


def _blurred(image: Image, radius: float) -> Image:
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(radius * max(image.size) / 64))


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    return (
        value if isinstance(value, (str, int, float, bool, type(None), list, dict)) else str(value)
    )
