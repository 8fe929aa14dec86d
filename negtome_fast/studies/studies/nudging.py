"""Nudging: how often a memorised image comes out, and what comes out instead.

Two models: the embedded one with its protected characters, and the one that
`negtome_fast.studies.toy_model.overfit` makes. Each memorised output is generated again, at most
three times, by every method from the same seeds; plain re-seeding is the baseline. Settings were
found on other seeds (docs/nudging.md).
"""

from __future__ import annotations

import hashlib
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ... import models
from ...config import NegToMeConfig
from ...files import write_atomically
from ...models import avatars as world
from ...nudging import (
    CallableFilter,
    Filter,
    NudgeSchedule,
    PixelDistance,
    ReferenceBank,
    generate_with_nudging,
    judge,
)
from ..intervals import FrechetTo, Mean, bootstrap, paired_bootstrap
from ..measures import feature_cosine, latent_l2, prompt_hits
from ..sampler import Laboratory
from ..scores import triple
from ..toy_model import overfit
from . import figures
from .figures import BLUE, COLOURS, GREY
from .study import SEED, Run, Study
from .tables import cell, markdown, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ATTEMPTS = 4
"""The plain generation included."""

PIXELS = 0.10
"""Root mean square difference to a target at which an output counts as its copy."""

DESIRED, FEW_DESIRED = 40, 6
"""Ordinary avatars for each prompt that images are steered toward."""

CHUNK = 2
"""Prompts that are drawn together and kept as one file."""

REAL_SEED, DESIRED_SEED, CHANCE_SEED = 9_000, 9_500, 9_900
FORMAT = 1
"""Of the store; a change of what unchanged settings draw must raise it."""

NEGTOME = NegToMeConfig(alpha=1.5, threshold=0.2, t_start=1000, t_end=400)


@dataclass(frozen=True)
class Method:
    """How flagged images are generated again: `generate_with_nudging`'s method and what it gets."""

    label: str
    method: Any
    desired: bool = False
    negtome: NegToMeConfig | None = None


METHODS: dict[str, Method] = {
    "reseed": Method("re-seeding", "reseed"),
    "nudge": Method("nudge", "nudge", desired=True),
    "both": Method("both", "both", desired=True, negtome=NEGTOME.with_overrides(alpha=0.5)),
    "negtome": Method("NegToMe", "negtome", negtome=NEGTOME),
    "away": Method("nudge, undesired points alone", "nudge"),
}
PLAIN = "plain"
SCHEDULE = NudgeSchedule()


@dataclass(frozen=True)
class Subject:
    """A model and what it has memorised.

    Attributes:
        name: in the result.
        label: for readers.
        pipe: the pipeline.
        weights: says which, for the store.
        bank: the memorised images, by the prompts that draw them.
        filters: that judge its outputs.
    """

    name: str
    label: str
    pipe: Any
    weights: str
    bank: ReferenceBank
    filters: tuple[Filter, ...]


def subjects(lab: Laboratory, quick: bool) -> list[Subject]:
    """Both models; a rehearsal has the embedded one only. Trains the overfitted one if needed."""

    def protected(images: Tensor) -> list[float]:
        return [float(one["character"] != "none") for one in lab.reader.read(images * 2 - 1)]

    drawn = [(name, world.render(avatar)) for name, (avatar, _) in world.CHARACTERS.items()]
    bank = ReferenceBank.build(drawn, size=world.IMAGE_SIZE)
    reader = CallableFilter(protected, 0.5, "reader")
    found = [
        Subject(
            "characters",
            "protected characters",
            lab.pipe,
            "embedded",
            bank,
            (PixelDistance(bank, PIXELS), reader),
        )
    ]
    if quick:
        return found
    if not (overfit.FOLDER / overfit.RECORD).is_file():
        overfit.main([])
    weights = overfit.FOLDER / "transformer" / "diffusion_pytorch_model.safetensors"
    memorised = ReferenceBank(tuple(overfit.targets()), overfit.target_images())
    pipe = overfit.load_overfitted()
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    filters = (PixelDistance(memorised, PIXELS),)
    label = "overfitted variant"
    return [*found, Subject("overfitted", label, pipe, digest, memorised, filters)]


def fitting(prompt: str, count: int, seed: int) -> Tensor:
    """Ordinary avatars that show what the prompt names, the rest drawn evenly; uint8."""
    named, random = world.attributes_in(prompt), np.random.default_rng(seed)
    avatars = []
    for number in range(count):
        chosen = {
            name: named.get(name) or values[random.integers(len(values))]
            for name, values in world.ATTRIBUTES.items()
        }
        avatars.append(world.Avatar(seed=f"{seed}-{number}", **chosen))
    return rendered(avatars)


def rendered(avatars: Sequence[world.Avatar]) -> Tensor:
    """uint8 (N, 3, 64, 64)."""
    drawn = np.stack([world.render(avatar) for avatar in avatars])
    return torch.from_numpy(np.ascontiguousarray(drawn.transpose(0, 3, 1, 2)))


def desired(subject: Subject, prompts: Sequence[str], count: int) -> dict[str, ReferenceBank]:
    """For each prompt `count` ordinary avatars that fit it, less those the filters flag."""
    banks = {}
    for number, prompt in enumerate(prompts):
        images = fitting(prompt, count, DESIRED_SEED + number)
        names = tuple(f"{prompt} {i}" for i in range(count))
        banks[prompt] = ReferenceBank(names, images).passing(subject.filters)
    return banks


@dataclass(frozen=True)
class Drawn:
    """Outputs of a method, prompt by prompt, with the attempts at each."""

    images: Tensor  # (N, 3, 64, 64) in [0, 1]
    attempts: list[int]
    passed: list[bool]


class Draw:
    """Draws a subject's outputs, and keeps them in the store of the laboratory."""

    def __init__(self, run: Run, subject: Subject, prompts: Sequence[str], each: int) -> None:
        self._run, self.subject = run, subject
        self.prompts, self.each = tuple(prompts), each
        self._count = FEW_DESIRED if run.sizes.quick else DESIRED
        self.desired = desired(subject, prompts, self._count)

    def method(self, name: str, tick: Callable[[int], Any]) -> Drawn:
        """`PLAIN` or a name of `METHODS`."""
        parts = []
        for start in range(0, len(self.prompts), CHUNK):
            prompts = self.prompts[start : start + CHUNK]
            seeds = [
                SEED + 10_000 * (start + i) + j
                for i in range(len(prompts))
                for j in range(self.each)
            ]
            parts.append(self._chunk(name, prompts, seeds))
            tick(len(seeds))
        return Drawn(
            torch.cat([part.images for part in parts]),
            [count for part in parts for count in part.attempts],
            [passed for part in parts for passed in part.passed],
        )

    def _chunk(self, name: str, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        path = self._path(name, prompts, seeds)
        if path is not None and path.is_file():
            kept = np.load(path)
            images = torch.from_numpy(kept["images"]).float() / 255
            return Drawn(images, kept["attempts"].tolist(), kept["passed"].tolist())
        drawn = self._generated(name, prompts, seeds)
        images = (drawn.images.clamp(0, 1) * 255).round().byte()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            np.savez(buffer, images=images.numpy(), attempts=drawn.attempts, passed=drawn.passed)
            write_atomically(path, buffer.getvalue())
        # As stored, so that a run that goes on measures what one in a piece does.
        return Drawn(images.float() / 255, drawn.attempts, drawn.passed)

    def _generated(self, name: str, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        subject, plain = self.subject, name == PLAIN
        method = METHODS["reseed" if plain else name]
        result = generate_with_nudging(
            subject.pipe,
            list(prompts),
            filters=subject.filters,
            undesired=subject.bank,
            desired=self.desired if method.desired else None,
            method=method.method,
            negtome=method.negtome,
            schedule=SCHEDULE,
            max_attempts=1 if plain else ATTEMPTS,
            num_images_per_prompt=self.each,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            first=None if plain else self._chunk(PLAIN, prompts, seeds).images,
            output_type="pt",
            negative_prompt=[""] * len(prompts),
            true_cfg_scale=models.GUIDANCE_SCALE,
            num_inference_steps=self._run.sizes.steps,
            height=world.IMAGE_SIZE,
            width=world.IMAGE_SIZE,
            max_sequence_length=models.TEXT_LENGTH,
        )
        attempts = [len(rows) for rows in result.attempts]
        return Drawn(torch.stack(result.images), attempts, list(result.passed))

    def _path(self, name: str, prompts: Sequence[str], seeds: Sequence[int]) -> Path | None:
        if self._run.lab.store is None:
            return None
        identity: dict[str, Any] = {
            "format": FORMAT,
            "weights": self.subject.weights,
            "steps": self._run.sizes.steps,
            "prompts": list(prompts),
            "seeds": list(seeds),
            "torch": torch.__version__,
        }
        if name != PLAIN:
            method = METHODS[name]
            identity |= {
                "method": method.method,
                "desired": self._count if method.desired else 0,
                "negtome": None if method.negtome is None else method.negtome.to_dict(),
                "schedule": asdict(SCHEDULE),
                "pixels": PIXELS,
                "attempts": ATTEMPTS,
            }
        text = json.dumps(identity, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._run.lab.store / "nudging" / self.subject.name / f"{name}-{digest}.npz"


@dataclass(frozen=True)
class Measured:
    """What is known of each output of one method; tensors `(N,)`, but for the features."""

    drawn: Drawn
    features: Tensor
    readings: list[dict[str, str]]
    memorised: Tensor
    agrees: Tensor
    pixels: Tensor
    latents: Tensor
    cosine: Tensor
    nearest_desired: Tensor


@torch.no_grad()
def latents_of(pipe: Any, images: Tensor) -> Tensor:
    mean = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    return (mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def measure(lab: Laboratory, draw: Draw, drawn: Drawn) -> Measured:
    """Distances are to the memorised image of the output's own prompt."""
    subject, images = draw.subject, drawn.images
    prompts = [prompt for prompt in draw.prompts for _ in range(draw.each)]
    seen = lab.measure(images)
    features = torch.from_numpy(seen["features"])
    readings = lab.reader.read(images * 2 - 1)
    targets = subject.bank.pixels
    target_features = lab.features(targets)
    target_latents = latents_of(subject.pipe, targets)
    latents = latents_of(subject.pipe, images)
    cosine, pixels, distance, nearest = (torch.zeros(len(images)) for _ in range(4))
    for prompt in draw.prompts:
        own = torch.tensor([place for place, one in enumerate(prompts) if one == prompt])
        row = subject.bank.names.index(prompt)
        cosine[own] = feature_cosine(features[own], target_features[row]).float()
        distance[own] = latent_l2(latents[own], target_latents[row]).float()
        pixels[own] = (images[own] - targets[row]).square().mean(dim=(1, 2, 3)).sqrt()
        wanted = PixelDistance(draw.desired[prompt], 0.0).judge(images[own])
        nearest[own] = torch.tensor([verdict.score for verdict in wanted])
    flagged = [rows[-1].triggered for rows in judge(subject.filters, images)]
    return Measured(
        drawn,
        features,
        readings,
        torch.tensor(flagged).double(),
        prompt_hits(readings, prompts).double(),
        pixels,
        distance,
        cosine,
        nearest,
    )


def record(
    name: str, one: Measured, base: Measured | None, real: Tensor, prompts: Sequence[str]
) -> dict[str, Any]:
    """Measures with 95% intervals, and differences to re-seeding from the same seeds."""
    each = len(one.pixels) // len(prompts)
    strata = [prompt for prompt in prompts for _ in range(each)]
    statistics_of: dict[str, tuple[Callable[[Any], float], Callable[[Measured], Any]]] = {
        "memorised": (Mean(), lambda m: m.memorised),
        "agreement": (Mean(), lambda m: m.agrees),
        "frechet": (FrechetTo(real), lambda m: m.features),
        "cosine": (Mean(), lambda m: m.cosine),
        "pixels": (Mean(), lambda m: m.pixels),
        "latents": (Mean(), lambda m: m.latents),
        "nearest_desired": (Mean(), lambda m: m.nearest_desired),
        "generations": (Mean(), lambda m: torch.tensor(m.drawn.attempts).double()),
    }
    found: dict[str, Any] = {"name": name, "measures": {}}
    for key, (statistic, values) in statistics_of.items():
        found["measures"][key] = triple(bootstrap(statistic, values(one), strata=strata))
    if base is not None:
        found["against_reseeding"] = {
            key: triple(
                paired_bootstrap(
                    statistics_of[key][0],
                    statistics_of[key][1](one),
                    statistics_of[key][1](base),
                    strata=strata,
                )
            )
            for key in ("memorised", "agreement", "frechet", "cosine")
        }
    return found


def run(run: Run) -> dict[str, Any]:
    from tqdm import tqdm

    # Before the overfitted model is trained, which takes minutes.
    total = len(world.CHARACTERS) + len(overfit.PROMPTS)
    each = 2 if run.sizes.quick else run.sizes.images // total
    if each < 2 or (not run.sizes.quick and run.sizes.images % total):
        raise ValueError(
            f"--samples {run.sizes.images}: there are {total} prompts, so it must be a multiple of "
            f"{total}, at least {2 * total}"
        )
    found = subjects(run.lab, run.sizes.quick)
    names = (PLAIN, *METHODS)
    draws = [
        Draw(run, subject, subject.bank.names[:2] if run.sizes.quick else subject.bank.names, each)
        for subject in found
    ]
    measured: list[dict[str, Measured]] = [{} for _ in draws]
    drawn = sum(len(draw.prompts) for draw in draws) * each
    with tqdm(total=len(names) * drawn, unit="image", disable=not run.progress) as bar:
        for name in names:
            for draw, own in zip(draws, measured, strict=True):
                bar.set_description(f"{draw.subject.name}, {name}")
                own[name] = measure(run.lab, draw, draw.method(name, bar.update))
    results = [_of_subject(run, draw, own) for draw, own in zip(draws, measured, strict=True)]
    return {
        "max_attempts": ATTEMPTS,
        "pixels_threshold": PIXELS,
        "schedule": json.loads(json.dumps(asdict(SCHEDULE))),
        "negtome": NEGTOME.to_dict(),
        "methods": {name: method.label for name, method in METHODS.items()},
        "subjects": results,
    }


def _of_subject(run: Run, draw: Draw, measured: dict[str, Measured]) -> dict[str, Any]:
    subject = draw.subject
    ordinary = [
        fitting(prompt, draw.each, REAL_SEED + i).float() / 255
        for i, prompt in enumerate(draw.prompts)
    ]
    real = torch.cat([run.lab.features(images) for images in ordinary])
    near = [
        verdict.score
        for prompt, images in zip(draw.prompts, ordinary, strict=True)
        for verdict in PixelDistance(draw.desired[prompt], 0.0).judge(images)
    ]
    count = 10 if run.sizes.quick else 400
    balanced = rendered(world.sample_avatars(count, CHANCE_SEED, "balanced"))
    by_chance = PixelDistance(subject.bank, PIXELS).judge(balanced.float() / 255)
    base = measured["reseed"]
    _sheet(run, draw, measured)
    return {
        "name": subject.name,
        "label": subject.label,
        "prompts": list(draw.prompts),
        "images": len(base.pixels),
        "near_by_chance": sum(verdict.triggered for verdict in by_chance) / len(by_chance),
        "ordinary_nearest_desired": round(statistics.mean(near), 4),
        "methods": [
            record(name, one, base if name not in (PLAIN, "reseed") else None, real, draw.prompts)
            for name, one in measured.items()
        ],
        "pixels": {name: _rounded(one.pixels) for name, one in measured.items()},
        "projection": _projection(run.lab, subject, real, measured),
    }


def _rounded(values: Tensor, digits: int = 3) -> list[Any]:
    return [
        _rounded(value, digits) if value.dim() else round(float(value), digits) for value in values
    ]


def _projection(
    lab: Laboratory, subject: Subject, real: Tensor, measured: dict[str, Measured]
) -> dict[str, Any]:
    """Two principal components of the features of ordinary avatars and memorised images."""
    targets = lab.features(subject.bank.pixels)
    fitted = torch.cat([real, targets]).double()
    mean = fitted.mean(dim=0)
    axes = torch.linalg.svd(fitted - mean, full_matrices=False).Vh[:2]
    shown = {"real": real, "targets": targets, **{n: m.features for n, m in measured.items()}}
    spread = (fitted - mean) @ axes.T
    return {
        "explained": round(float(spread.var(dim=0).sum() / fitted.var(dim=0).sum()), 3),
        **{name: _rounded((rows.double() - mean) @ axes.T, 2) for name, rows in shown.items()},
    }


def _sheet(run: Run, draw: Draw, measured: dict[str, Measured]) -> None:
    """Two images of each prompt: the memorised one, plain, and each method's."""
    from PIL import Image

    from ...generation.contact_sheet import Row, sheet

    subject, shown = draw.subject, 2
    places = [p * draw.each + i for p in range(len(draw.prompts)) for i in range(shown)]

    def pictures(images: Tensor) -> list[Image.Image]:
        arrays = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
        return [Image.fromarray(array) for array in arrays]

    own = torch.tensor([subject.bank.names.index(p) for p in draw.prompts for _ in range(shown)])
    rows = [Row("memorised images", pictures(subject.bank.pixels[own]))]
    for name, one in measured.items():
        heading = PLAIN if name == PLAIN else METHODS[name].label
        share = float(one.memorised.mean())
        rows.append(
            Row(
                f"{heading}: {share:.0%} of {len(one.pixels)} still memorised",
                pictures(one.drawn.images[places]),
                accent=name in ("nudge", "both"),
            )
        )
    run.pictures[subject.name] = sheet(
        f"{subject.label}: before and after at most {ATTEMPTS} attempts".capitalize(),
        rows,
        f"The first {shown} seeds of {len(draw.prompts)} prompts: " + "; ".join(draw.prompts),
        tile=64,
    )


def table(result: dict[str, Any]) -> str:
    """A row for each model and method."""
    rows = []
    for subject in result["subjects"]:
        for one in subject["methods"]:
            measures = one["measures"]
            label = "plain" if one["name"] == PLAIN else result["methods"][one["name"]]
            compared = one.get("against_reseeding")
            rows.append(
                [
                    f"{subject['label']} ({subject['images']})",
                    label,
                    percent(measures["memorised"]),
                    percent(measures["agreement"]),
                    cell(measures["frechet"], 1),
                    signed(compared["frechet"], 1) if compared else "-",
                    f"{measures['cosine'][0]:.2f}",
                    f"{measures['pixels'][0]:.3f}",
                    f"{measures['latents'][0]:.1f}",
                    f"{measures['nearest_desired'][0]:.3f}",
                    f"{measures['generations'][0]:.2f}",
                ]
            )
    header = [
        "memorised by (images)",
        "method",
        "still memorised",
        "prompt kept",
        "Frechet distance",
        "less re-seeding's",
        "feature cosine to the memorised image",
        "RMS of pixels",
        "L2 of latents",
        "RMS to the nearest desired point",
        "generations an image",
    ]
    first = result["subjects"][0]
    note = (
        f"{first['images'] // len(first['prompts'])} images of each prompt, "
        f"{result['sizes']['steps']} steps, at most {result['max_attempts']} generations of an "
        "image, the plain one included; 95% intervals in brackets, differences paired by seed. "
        f"torch {result['versions']['torch']}, {result['date'][:10]}. Made by "
        f"`{result['command']}`."
    )
    return markdown(header, rows) + "\n\n" + note


def percent(values: Sequence[float]) -> str:
    return f"{values[0]:.1%} [{max(0.0, values[1]):.1%}, {min(1.0, values[2]):.1%}]"


def goal(result: dict[str, Any], method: str = "nudge") -> dict[str, dict[str, str]]:
    """For each model, which parts of the goal a method reaches: yes, no, or no change seen."""
    reached = {}
    for subject in result["subjects"]:
        one = next(m for m in subject["methods"] if m["name"] == method)
        compared = one["against_reseeding"]
        estimate, low, high = compared["frechet"]
        quality = "yes" if high < 0 else "no" if low > 0 else "no change seen"
        reached[subject["label"]] = {
            "nothing memorised is left": _yes(one["measures"]["memorised"][0] == 0),
            "Frechet distance no worse than re-seeding's": f"{quality} ({estimate:+.0f})",
            "prompt agreement within 1 point of it": _yes(compared["agreement"][0] >= -0.01),
        }
    return reached


def _yes(met: bool) -> str:
    return "yes" if met else "no"


SHOWN = {"reseed": GREY, "negtome": COLOURS[2], "nudge": BLUE, "both": COLOURS[1]}


def draw_figures(result: dict[str, Any]) -> dict[str, Figure]:
    """The paper's figures 4 and 5 for these models: distances, and arrows in feature space."""
    count = len(result["subjects"])
    distances, grid = figures.panels(6 * count, 3.8, columns=count)
    for axes, subject in zip(grid[0], result["subjects"], strict=True):
        pixels = subject["pixels"]
        edges = np.linspace(0, max(max(values) for values in pixels.values()) * 1.02, 26)
        axes.hist(pixels[PLAIN], edges, color="#d9d9d9", label="plain")
        for name, colour in SHOWN.items():
            label = result["methods"][name]
            axes.hist(
                pixels[name], edges, histtype="step", color=colour, linewidth=1.6, label=label
            )
        axes.axvline(result["pixels_threshold"], color="black", linewidth=0.9, linestyle="--")
        title = f"{subject['label']}: distance to the memorised image"
        figures.tidy(axes, title, "root mean square difference of pixels", "images")
        axes.legend(frameon=False, fontsize=8)
    arrows, grid = figures.panels(6 * count, 4.6, columns=count)
    for axes, subject in zip(grid[0], result["subjects"], strict=True):
        shown = subject["projection"]
        axes.scatter(*_columns(shown["real"]), color="#d0d0d0", s=12, label="ordinary avatars")
        for before, after in zip(shown[PLAIN], shown["nudge"], strict=True):
            if before != after:
                axes.annotate(
                    "",
                    after,
                    before,
                    arrowprops={"arrowstyle": "->", "color": BLUE, "alpha": 0.45, "lw": 0.8},
                )
        axes.scatter(*_columns(shown[PLAIN]), color=GREY, s=14, label="plain")
        axes.scatter(*_columns(shown["nudge"]), color=BLUE, s=14, label="nudged")
        axes.scatter(
            *_columns(shown["targets"]), color=COLOURS[0], marker="*", s=110, label="memorised"
        )
        share = f"{shown['explained']:.0%} of the variance"
        figures.tidy(axes, f"{subject['label']}: features", "first component", "second component")
        axes.legend(frameon=False, fontsize=8, title=share, title_fontsize=8)
    return {"distances": distances, "arrows": arrows}


def _columns(points: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[point[axis] for point in points] for axis in (0, 1)]


STUDY = Study(
    "nudging",
    "memorised images, before and after nudging, NegToMe and re-seeding",
    96,
    run,
    table,
    draw_figures,
)


# --------------------------------------------------------------------------------------------
# What it costs
# --------------------------------------------------------------------------------------------
ROUNDS = 25
FEW_ROUNDS = 2


def run_cost(run: Run) -> dict[str, Any]:
    """Interleaved rounds: filters alone against the loop on what passes; then each retry."""
    sizes, lab = run.sizes, run.lab
    subject = subjects(lab, quick=True)[0]
    prompts = ["a pixel art person"]
    banks = desired(subject, ["captain red"], FEW_DESIRED)
    call: dict[str, Any] = {
        "negative_prompt": "",
        "true_cfg_scale": models.GUIDANCE_SCALE,
        "num_inference_steps": sizes.steps,
        "num_images_per_prompt": sizes.images,
        "height": world.IMAGE_SIZE,
        "width": world.IMAGE_SIZE,
        "max_sequence_length": models.TEXT_LENGTH,
        "output_type": "pt",
    }

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(sizes.images)]

    def alone() -> None:
        images = subject.pipe(prompts[0], generator=generators(), **call).images
        assert not any(rows[-1].triggered for rows in judge(subject.filters, images))

    def loop() -> None:
        result = generate_with_nudging(
            subject.pipe,
            prompts[0],
            filters=subject.filters,
            undesired=subject.bank,
            desired=banks["captain red"],
            generator=generators(),
            **call,
        )
        assert all(result.passed)

    def plain() -> None:
        subject.pipe("captain red", generator=generators(), **call)

    always = CallableFilter(lambda images: [1.0] * len(images), 0.5, "always")
    first = subject.pipe("captain red", generator=generators(), **call).images

    def retry(method: Method) -> Callable[[], None]:
        def work() -> None:
            generate_with_nudging(
                subject.pipe,
                "captain red",
                filters=[always],
                undesired=subject.bank,
                desired=banks["captain red"] if method.desired else None,
                method=method.method,
                negtome=method.negtome,
                generator=generators(),
                first=first,
                max_attempts=2,
                **call,
            )

        return work

    retries = {name: retry(method) for name, method in METHODS.items() if name != "away"}
    rounds = FEW_ROUNDS if sizes.quick else ROUNDS
    untriggered = interleaved({"filters alone": alone, "loop": loop}, rounds)
    triggered = interleaved({PLAIN: plain, **retries}, max(2, rounds // 3))
    return {
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "untriggered": added(untriggered, "filters alone", sizes.images),
        "triggered": added(triggered, PLAIN, sizes.images),
    }


def interleaved(work: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in turn, after one round that is not counted; every other round backward."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name in list(work) if number % 2 else list(reversed(work)):
            began = time.perf_counter()
            work[name]()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def added(times: dict[str, list[float]], base: str, images: int) -> dict[str, Any]:
    """Of each: median seconds an image, and the added share of paired rounds with its interval."""
    found: dict[str, Any] = {}
    for name, own in times.items():
        ratios = torch.tensor([a / b - 1 for a, b in zip(own, times[base], strict=True)])
        found[name] = {"seconds_per_image": round(statistics.median(own) / images, 5)}
        if name != base:
            found[name]["added"] = triple(bootstrap(_median, ratios.double()))
    return found


def _median(values: Any) -> float:
    return float(torch.as_tensor(values).quantile(0.5))


def table_cost(result: dict[str, Any]) -> str:
    rows = []
    for case, label in (("untriggered", "nothing is flagged"), ("triggered", "one retry")):
        for name, one in result[case].items():
            words = "-"
            if "added" in one:
                middle, low, high = one["added"]
                words = f"{middle:+.1%} [{low:+.1%}, {high:+.1%}]"
            shown = METHODS[name].label if name in METHODS else name
            rows.append([label, shown, f"{one['seconds_per_image']:.3f}", words])
    note = (
        f"Medians of {result['rounds']} interleaved rounds ({max(2, result['rounds'] // 3)} of "
        f"retries) of {result['sizes']['images']} images, {result['sizes']['steps']} steps, "
        f"{result['threads']} thread(s), and 95% intervals of paired rounds; added to the first "
        f"row of each case. {result['date'][:10]}, torch {result['versions']['torch']}. Made by "
        f"`{result['command']}`, which needs a machine that does nothing else."
    )
    return markdown(["case", "what", "seconds an image", "added"], rows) + "\n\n" + note


COST = Study(
    "nudging-cost",
    "time of nudging where nothing is flagged and of a retry, on a quiet machine",
    2,
    run_cost,
    table_cost,
    lambda result: {},
)
