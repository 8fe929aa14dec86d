"""Everything that the applications share: settings, pictures, and measures image by image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....config import NegToMeConfig
from ....generation import APPLICATIONS
from ....models.avatars import Avatar, render
from ...conditions import Condition, Group
from ...intervals import Interval, Mean
from ...samples import Samples
from ...scores import Scores, plan_of, record, triple
from ..study import SEED, StudyRun

GROUP = 2
"""Images of a group. With an outside reference no image sees another; the groups are pairs because
the bootstrap must not draw a single image, which has no pairwise cosine."""

UNGUIDED = "unguided"

Values = dict[str, Tensor]
"""Measures of a condition, each with one number per image, (N,)."""


def settings(name: str, **overrides: Any) -> NegToMeConfig:
    """Return the settings of `negtome-fast generate --preset NAME` on the embedded model."""
    application = APPLICATIONS[name]
    return NegToMeConfig(**{**application.guidance, **application.embedded, **overrides})


def picture_avatar(style: str) -> Avatar:
    """Return the avatar of `picture`: no prompt names its attributes, and no style favours them."""
    return Avatar(style, "bronze", "blue", "bun", "reference")


@cache
def picture(style: str) -> np.ndarray:
    """Return a picture of a style to serve as reference, uint8 (64, 64, 3)."""
    return render(picture_avatar(style))


def unguided(
    run: StudyRun, prompts: Sequence[str], scale: float = Condition.guidance_scale
) -> Samples:
    """Return unguided images of the prompts."""
    condition = Condition(UNGUIDED, guidance_scale=scale)
    return run.samples([condition], prompts, group=GROUP, seed=SEED)[UNGUIDED]


def shown(samples: Samples, head: str, values: Sequence[str]) -> Tensor:
    """Return 1 for each image in which the reader sees the image's entry of `values`, else 0."""
    readings = zip(samples.readings, values, strict=True)
    return torch.tensor([reading[head] == value for reading, value in readings]).double()


def own_references(
    run: StudyRun, base: Samples, name: str, condition: Callable[[int], Condition], size: int = 1
) -> Samples:
    """Draw the prompts and seeds of `base` again, each image with a condition of its own.

    Args:
        run: the run.
        base: gives prompts and seeds.
        name: name of the joined condition.
        condition: the condition of image i, and of its neighbours.
        size: number of consecutive images of one prompt that share a condition.
    """
    from tqdm import tqdm

    parts = []
    with tqdm(total=len(base), unit="image", desc=name, disable=not run.progress) as bar:
        for item in range(0, len(base), size):
            wanted = replace(condition(item), steps=run.sizes.steps)
            group = Group(base.prompts[item], base.seeds[item : item + size])
            parts.append(run.sampler.sample(wanted, [group], tick=bar.update))
    return replace(Samples.joined(parts, name), groups=base.groups)


def measured(values: Values, other: Values | None, samples: Samples) -> dict[str, Any]:
    """Return every measure, and its paired difference to `other`, for the file of results."""
    found: dict[str, Any] = {
        "measured": {name: triple(_interval(own, samples)) for name, own in values.items()}
    }
    if other is not None:
        found["differences"] = {
            name: _difference(own, other[name], samples) for name, own in values.items()
        }
    return found


def compared(
    scores: Mapping[str, Scores], values: Callable[[Scores], Values]
) -> list[dict[str, Any]]:
    """Return a record per condition; all are compared with the first."""
    base, *_ = scores.values()
    unguided = values(base)
    return [
        {
            **record(one, base),
            **measured(values(one), None if one is base else unguided, one.samples),
        }
        for one in scores.values()
    ]


def _interval(values: Tensor, samples: Samples, no_change: float | None = None) -> Interval:
    plan = plan_of(samples)
    return plan.interval(*plan.apply(Mean(), values, False), no_change, recentre=False)


def _difference(values: Tensor, other: Tensor, samples: Samples) -> list[Any]:
    """Return `[estimate, low, high, verdict]` of `values` less `other`, paired by image."""
    found = _interval(values - other, samples, no_change=0.0)
    return [*triple(found), found.verdict]
