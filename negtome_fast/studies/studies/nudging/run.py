"""The run of the study: every method on every model, and the record of each model."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ....models import avatars as world
from ....nudging import PixelDistance
from ...sampler import Sampler
from ...toy_model import overfit
from ..study import Study, StudyRun
from .drawing import ATTEMPTS, SCHEDULE, SubjectDrawing
from .measuring import Measured, measure, record
from .results import figures, table
from .subjects import METHODS, NEGTOME, PIXELS, PLAIN, Subject, fitting, rendered, subjects

_REAL_SEED, _CHANCE_SEED = 9_000, 9_900


def run(run: StudyRun) -> dict[str, Any]:
    """Draw and measure every method on every model.

    Raises:
        ValueError: the images do not divide among the prompts of both models.
    """
    from tqdm import tqdm

    # Checked first: training the overfitted model takes minutes.
    each = _images_per_prompt(run)
    drawings = [
        SubjectDrawing(run, one, one.bank.names[:2] if run.sizes.quick else one.bank.names, each)
        for one in subjects(run.sampler, run.sizes.quick)
    ]
    names = (PLAIN, *METHODS)
    measured: list[dict[str, Measured]] = [{} for _ in drawings]
    images = sum(len(drawing.prompts) for drawing in drawings) * each
    with tqdm(total=len(names) * images, unit="image", disable=not run.progress) as bar:
        for name in names:
            for drawing, own in zip(drawings, measured, strict=True):
                bar.set_description(f"{drawing.subject.name}, {name}")
                own[name] = measure(run.sampler, drawing, drawing.method(name, bar.update))
    return {
        "max_attempts": ATTEMPTS,
        "pixels_threshold": PIXELS,
        "schedule": json.loads(json.dumps(asdict(SCHEDULE))),
        "negtome": NEGTOME.to_dict(),
        "methods": {name: method.label for name, method in METHODS.items()},
        "subjects": [
            _record(run, drawing, own) for drawing, own in zip(drawings, measured, strict=True)
        ],
    }


def _images_per_prompt(run: StudyRun) -> int:
    if run.sizes.quick:
        return 2
    images, prompts = run.sizes.images, len(world.CHARACTERS) + len(overfit.PROMPTS)
    if images % prompts or images < 2 * prompts:
        raise ValueError(
            f"the images must be a multiple of {prompts}, at least {2 * prompts}, since there are "
            f"{prompts} prompts, got {images}"
        )
    return images // prompts


def _record(
    run: StudyRun, drawing: SubjectDrawing, measured: Mapping[str, Measured]
) -> dict[str, Any]:
    """Return the results of one model for the file, and draw its sheet of images."""
    subject = drawing.subject
    ordinary = [
        fitting(prompt, drawing.each, _REAL_SEED + i).float() / 255
        for i, prompt in enumerate(drawing.prompts)
    ]
    real = torch.cat([run.sampler.features(images) for images in ordinary])
    near = [
        verdict.score
        for prompt, images in zip(drawing.prompts, ordinary, strict=True)
        for verdict in PixelDistance(drawing.desired[prompt], 0.0).judge(images)
    ]
    count = 10 if run.sizes.quick else 400
    balanced = rendered(world.sample_avatars(count, _CHANCE_SEED, "balanced"))
    by_chance = PixelDistance(subject.bank, PIXELS).judge(balanced.float() / 255)
    base = measured["reseed"]
    _sheet(run, drawing, measured)
    return {
        "name": subject.name,
        "label": subject.label,
        "prompts": list(drawing.prompts),
        "images": len(base.pixels),
        "near_by_chance": sum(verdict.triggered for verdict in by_chance) / len(by_chance),
        "ordinary_nearest_desired": round(statistics.mean(near), 4),
        "methods": [
            record(
                name, one, base if name not in (PLAIN, "reseed") else None, real, drawing.prompts
            )
            for name, one in measured.items()
        ],
        "pixels": {name: _rounded(one.pixels) for name, one in measured.items()},
        "projection": _projection(run.sampler, subject, real, measured),
    }


def _rounded(values: Tensor, digits: int = 3) -> list[Any]:
    return [
        _rounded(value, digits) if value.dim() else round(float(value), digits) for value in values
    ]


def _projection(
    sampler: Sampler, subject: Subject, real: Tensor, measured: Mapping[str, Measured]
) -> dict[str, Any]:
    """Project features on two principal components of ordinary avatars and memorised images."""
    targets = sampler.features(subject.bank.pixels)
    fitted = torch.cat([real, targets]).double()
    mean = fitted.mean(dim=0)
    axes = torch.linalg.svd(fitted - mean, full_matrices=False).Vh[:2]
    shown = {"real": real, "targets": targets, **{n: m.features for n, m in measured.items()}}
    spread = (fitted - mean) @ axes.T
    return {
        "explained": round(float(spread.var(dim=0).sum() / fitted.var(dim=0).sum()), 3),
        **{name: _rounded((rows.double() - mean) @ axes.T, 2) for name, rows in shown.items()},
    }


def _sheet(run: StudyRun, drawing: SubjectDrawing, measured: Mapping[str, Measured]) -> None:
    """Draw two images of each prompt: the memorised one, plain, and each method's."""
    from PIL import Image

    from ....generation.contact_sheet import Row, sheet

    subject, shown, prompts = drawing.subject, 2, drawing.prompts
    places = [p * drawing.each + i for p in range(len(prompts)) for i in range(shown)]

    def pictures(images: Tensor) -> Sequence[Image.Image]:
        arrays = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
        return [Image.fromarray(array) for array in arrays]

    own = torch.tensor([subject.bank.names.index(p) for p in prompts for _ in range(shown)])
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
        f"The first {shown} seeds of {len(prompts)} prompts: " + "; ".join(prompts),
        tile=64,
    )


STUDY = Study(
    "nudging",
    "memorised images, before and after nudging, NegToMe and re-seeding",
    96,
    run,
    table,
    figures,
)
