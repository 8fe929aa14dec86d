"""`negtome-fast eval own`: what guidance does to a model of yours, on prompts of yours.

Every group of images is drawn without and with guidance from the same seeds. A measure is taken of
each group, and intervals draw groups whole, the same on both sides. What is drawn is kept in the
store, so that a run that is interrupted goes on where it was.
"""

from __future__ import annotations

import json
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import generate, machine
from ...config import NegToMeConfig
from ..bootstrap import Mean, bootstrap, paired_bootstrap
from ..external import METRICS, Batch, Metric
from ..sampling import _SEEDS as SEEDS
from ..sampling import STORE, Group, _digest, _load, _save
from ..scores import triple
from .study import SCHEMA, save
from .tables import cell, markdown, signed

NAME = "own"

#: Of `METRICS`, those that mean something for a few images and need no others beside them.
OFFERED = ("embedded", "dreamsim", "clip", "lpips")
_OF_FEW = {"inception-style score"}  # of `embedded`: nothing for a few images

CONDITIONS = ("unguided", "NegToMe")


@dataclass(frozen=True)
class Request:
    """What is drawn and measured.

    Attributes:
        settings: model, prompts, images of each, seed, and what the pipeline and the guidance take;
            `guidance_scale` is set for each of `scales`.
        group: images of a prompt that are guided together.
        scales: of classifier-free guidance; None is the pipeline's own.
        metrics: names in `OFFERED`.
        command: that was given, for the record.
    """

    settings: generate.Settings
    group: int = 4
    scales: tuple[float | None, ...] = (None,)
    metrics: tuple[str, ...] = ("embedded",)
    command: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Refuses what cannot be right before anything is loaded."""
        images = self.settings.images
        unknown = [name for name in self.metrics if name not in OFFERED]
        if unknown:
            raise ValueError(
                f"--metric {unknown[0]}: there are {', '.join(OFFERED)}; fid and inception, which "
                "take thousands of images, are in negtome_fast.evaluation.external"
            )
        if self.group < 2:
            raise ValueError(f"--group must be 2 or more images, got {self.group}")
        if images < 1 or images % self.group or images > SEEDS:
            raise ValueError(f"-n {images} does not divide into groups of {self.group}: --group")
        if images * len(self.settings.prompts) < 2 * self.group:
            raise ValueError("an interval needs two groups of images: more prompts, or a larger -n")
        if len(set(self.scales)) < len(self.scales):
            raise ValueError("--guidance-scale has a value twice")
        self.settings.check()

    def groups(self) -> list[Group]:
        """Every image has a seed of its own, so that prompts are independent samples.

        More images or prompts leave the groups of a smaller request as they are.
        """
        first = self.settings.seed
        return [
            Group(prompt, tuple(first + number * SEEDS + start + i for i in range(self.group)))
            for number, prompt in enumerate(self.settings.prompts)
            for start in range(0, self.settings.images, self.group)
        ]


def request(options: Mapping[str, Any]) -> Request:
    """Of the options of the command line that were given, by name."""
    values = dict(options)
    if "model" not in values or "prompts" not in values:
        raise ValueError("eval own needs --model and --prompt: which model, and what it draws")
    guidance = generate.take_guidance(values)
    of_request = {name: values.pop(name) for name in ("group",) if name in values}
    for name in ("scales", "metrics"):
        if name in values:
            of_request[name] = tuple(values.pop(name))
    settings = generate.Settings(
        **{
            "images": 8,
            **values,
            "prompts": tuple(values["prompts"]),
            "call": dict(values.get("call", {})),
            "guidance": guidance,
        }
    )
    return Request(settings, command=_command(options), **of_request)


def perform(
    wanted: Request, out: Path, store: Path = STORE, *, progress: bool = True
) -> dict[str, Any]:
    """Draws what is missing, measures, and writes `own.json`, `own.md` and `own-sheet.png`.

    Args:
        wanted: see `Request`.
        out: folder of the results.
        store: folder of what was drawn.
        progress: show a progress bar.

    Raises:
        ValueError, FileNotFoundError: the model or an option does not fit.
        ImportError: a package is missing; names the extra to install.
    """
    from tqdm import tqdm

    measures = _measures(wanted)
    pipe = generate.load_pipeline(wanted.settings)
    groups = wanted.groups()
    plans = []
    for scale in wanted.scales:
        settings = replace(wanted.settings, guidance_scale=scale)
        # Both before anything is drawn: a mistake shows at once.
        call = generate.call_arguments(pipe, settings)
        plans.append((scale, call, generate.configuration(pipe, settings)))
    scales, rows = [], []
    total = len(plans) * len(CONDITIONS) * len(groups) * wanted.group
    with tqdm(total=total, unit="image", disable=not progress) as bar:
        for scale, call, config in plans:
            drawn: dict[str, list[dict[str, Any]]] = {name: [] for name in CONDITIONS}
            # In turns, so that both conditions have the same share of what else the machine does.
            for group in groups:
                for name in CONDITIONS:
                    label = _label(scale, name)
                    bar.set_description(label)
                    chosen = config if name == "NegToMe" else None
                    part = _group(wanted, pipe, call, chosen, group, store / NAME)
                    drawn[name].append(_measured(group, part, measures))
                    if group.seeds[0] in _shown(wanted):
                        rows.append((label, part["images"]))
                    bar.update(wanted.group)
            scales.append(
                {
                    "guidance_scale": scale,
                    "call": {key: generate._plain(value) for key, value in call.items()},
                    "config": config.to_dict(),
                    **_compared(drawn, [metric.name for metric in measures], groups),
                }
            )
    result = {
        "schema": SCHEMA,
        "study": NAME,
        "command": wanted.command,
        "settings": wanted.settings.to_dict(),
        "sizes": {"images": len(groups) * wanted.group, "group": wanted.group},
        "better": {metric.name: metric.better for metric in measures},
        "pipeline": type(pipe).__name__,
        "device": str(getattr(pipe, "_execution_device", "unknown")),
        **machine.describe(),
        "versions": generate.versions(),
        "scales": scales,
    }
    save(out / f"{NAME}.json", result)
    (out / f"{NAME}.md").write_text(table(result) + "\n", encoding="utf-8")
    _sheet(wanted, rows).save(out / f"{NAME}-sheet.png")
    return result


def table(result: Mapping[str, Any]) -> str:
    """Markdown: every measure at every scale, without and with guidance, and what changed."""
    rows = []
    for part in result["scales"]:
        without, guided = (part["conditions"][name] for name in CONDITIONS)
        scale = _scale(part["guidance_scale"])
        for name, change in part["compared"].items():
            rows.append(
                [
                    scale,
                    f"{name} ({result['better'][name]} is better)",
                    *(cell(one["measures"][name], 3) for one in (without, guided)),
                    signed(change["difference"], 3),
                    change["verdict"],
                ]
            )
        times = [one["seconds_an_image"] for one in (without, guided)]
        pushed = f"{guided['pushed']:.1%}"
        rows.append([scale, "image tokens pushed", "", pushed, "", ""])
        added = f"{times[1] / times[0] - 1:+.1%}"
        rows.append([scale, "seconds an image", *(f"{t:.3f}" for t in times), added, "no interval"])
    header = ["guidance scale", "measure", *CONDITIONS, "difference", "seen"]
    sizes, settings = result["sizes"], result["settings"]
    count, prompts = sizes["images"] // sizes["group"], len(settings["prompts"])
    return (
        f"{markdown(header, rows)}\n\n"
        f"{settings['model']}: {prompts} prompt{'s' * (prompts > 1)}, {sizes['images']} images a "
        f"condition in {count} groups of {sizes['group']}. Measures are of the images of a group, "
        "their means over groups; 95% intervals in brackets draw groups whole, each for itself: "
        "about one in twenty errs, and with fewer than 8 groups of a prompt they are too narrow. "
        "Seconds are medians over groups, of use from several on and where nothing else ran. "
        f"torch {result['versions']['torch']}, {result['date'][:10]}. "
        f"Made by `{result['command']}`."
    )


def _measures(wanted: Request) -> list[Metric]:
    device = wanted.settings.device or generate._default_device()
    found: list[Metric] = []
    for name in dict.fromkeys(wanted.metrics):
        try:
            made = METRICS[name]() if name == "embedded" else METRICS[name](device)
        except OSError as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"--metric {name}: its weights cannot be loaded: {reason}") from error
        found += [made] if isinstance(made, Metric) else made
    return [m for m in found if set(m.needs) <= {"prompts"} and m.name not in _OF_FEW]


def _group(
    wanted: Request,
    pipe: Any,
    call: Mapping[str, Any],
    config: NegToMeConfig | None,
    group: Group,
    store: Path,
) -> dict[str, np.ndarray]:
    """Images uint8 (N, H, W, 3), seconds an image, and the share of tokens that were pushed.

    From the store, if they are there.
    """
    guidance = None if config is None else config.to_dict()
    identity = {
        "model": _model(wanted.settings.model),
        "pipeline": type(pipe).__name__,
        "dtype": str(getattr(pipe, "dtype", None)),
        "device": str(getattr(pipe, "_execution_device", None)),
        "versions": {name: generate.versions().get(name) for name in ("torch", "diffusers")},
        "call": {name: generate._plain(value) for name, value in call.items()},
        "guidance": guidance,
    }
    path = store / _digest(identity) / f"{_digest([group.prompt, *group.seeds])}.npz"
    if path.is_file():
        return _load(path)
    from ...pipelines import negtome_guidance

    with nullcontext() if config is None else negtome_guidance(pipe, config) as handle:
        began = time.perf_counter()
        made = generate.draw(pipe, call, group.prompt, group.seeds)
        seconds = (time.perf_counter() - began) / len(made)
    if not all(generate._is_image(image) for image in made):
        raise ValueError(f"{type(pipe).__name__} makes videos; eval own measures images")
    images = np.stack([np.asarray(image.convert("RGB")) for image in made])
    pushed = 0.0 if handle is None else handle.summary().total.pushed
    part = {"images": images, "seconds": np.array(seconds), "pushed": np.array(pushed)}
    _save(path, part, identity)
    return part


def _model(name: str) -> Any:
    """What tells a model from another: its name and, of a folder, its files' sizes and times."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    of_files = [[str(p.relative_to(folder)), s.st_size, s.st_mtime_ns] for p, s in files]
    return [str(folder.resolve()), _digest(of_files)]


def _measured(
    group: Group, part: Mapping[str, np.ndarray], measures: Sequence[Metric]
) -> dict[str, Any]:
    images = torch.from_numpy(part["images"]).permute(0, 3, 1, 2).float() / 255
    batch = Batch(images, [group.prompt] * len(images))
    return {
        "prompt": group.prompt,
        "seeds": list(group.seeds),
        "seconds_an_image": round(float(part["seconds"]), 4),
        "pushed": round(float(part["pushed"]), 6),
        "measures": {metric.name: round(metric(batch), 6) for metric in measures},
    }


def _compared(
    drawn: Mapping[str, Sequence[dict[str, Any]]], names: Sequence[str], groups: Sequence[Group]
) -> dict[str, Any]:
    prompts = [group.prompt for group in groups]
    # One group of a prompt leaves nothing to draw within it: prompts are drawn then.
    strata = prompts if min(map(prompts.count, prompts)) > 1 else None

    def values(condition: str, name: str) -> list[float]:
        return [part["measures"][name] for part in drawn[condition]]

    conditions = {
        condition: {
            "seconds_an_image": statistics.median(part["seconds_an_image"] for part in parts),
            "pushed": statistics.mean(part["pushed"] for part in parts),
            "measures": {
                name: triple(bootstrap(Mean(), values(condition, name), strata=strata))
                for name in names
            },
            "groups": list(parts),
        }
        for condition, parts in drawn.items()
    }
    compared = {}
    for name in names:
        without, guided = (values(condition, name) for condition in CONDITIONS)
        found = paired_bootstrap(Mean(), guided, without, strata=strata)
        compared[name] = {"difference": triple(found), "verdict": found.verdict}
    drawn_by = "groups within prompts" if strata else "groups"
    return {"drawn": drawn_by, "conditions": conditions, "compared": compared}


def _shown(wanted: Request, prompts: int = 6) -> set[int]:
    """First seeds of the groups on the sheet: one of each of the first prompts."""
    first, count = wanted.settings.seed, len(wanted.settings.prompts)
    return {first + number * SEEDS for number in range(min(prompts, count))}


def _sheet(wanted: Request, rows: Sequence[tuple[str, np.ndarray]]) -> Any:
    from PIL import Image

    from ...pictures import Row, sheet

    shown = [
        Row(label, [Image.fromarray(image) for image in images], accent="NegToMe" in label)
        for label, images in rows
    ]
    title = " | ".join(f'"{prompt}"' for prompt in wanted.settings.prompts)
    return sheet(title, shown, f"{wanted.settings.model}, same seeds in each pair of rows")


def _scale(scale: float | None) -> str:
    return "the model's" if scale is None else f"{scale:g}"


def _label(scale: float | None, condition: str) -> str:
    return f"{condition}, guidance scale {_scale(scale)}"


def _command(options: Mapping[str, Any]) -> str:
    """The command line of these options."""
    renamed = {"prompts": "prompt", "metrics": "metric", "scales": "guidance-scale"}
    words = ["negtome-fast", "eval", NAME]
    for name, value in options.items():
        option = f"--{renamed.get(name, name).replace('_', '-')}"
        if name == "prompts":
            words += [word for prompt in value for word in (option, prompt)]
        elif name == "call":
            for key, given in value:
                text = given if isinstance(given, str) else json.dumps(given)
                words += ["--argument", f"{key}={text}"]
        elif isinstance(value, (list, tuple)):
            words += [option, *map(str, value)]
        else:
            words += [option, str(value)]
    return shlex.join(words)
