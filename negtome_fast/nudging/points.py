"""Choice of the undesired and desired images that steer each flagged image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .bank import ReferenceBank
from .batch import retry_seed
from .images import resized
from .schedule import NudgeSchedule
from .selection import select_nearest

THUMBNAIL = 64
"""Side in pixels at which the points nearest to an image are searched."""


@dataclass(frozen=True)
class SteeringPoints:
    """Images that one image is steered away from and toward, with their names.

    Attributes:
        undesired, desired: `(k, 3, S, S)` uint8; desired is None without a bank of them.
    """

    undesired: Tensor
    undesired_names: tuple[str, ...]
    desired: Tensor | None
    desired_names: tuple[str, ...]


class BankSearch:
    """A bank that is searched for the images nearest in pixels."""

    def __init__(self, bank: ReferenceBank) -> None:
        if not isinstance(bank, ReferenceBank):
            raise TypeError(f"a ReferenceBank is needed, got {type(bank).__name__}")
        self.bank = bank

    @cached_property
    def _thumbnails(self) -> Tensor:
        # Made when the first image is flagged: images that pass at once pay nothing for it.
        return self.bank.thumbnails(THUMBNAIL)

    def nearest(self, image: Tensor, count: int) -> Tensor:
        """Rows `(count,)` of the bank that are nearest to `(3, H, W)`, or all of a small bank."""
        count = min(count, len(self.bank))
        return select_nearest(resized(image[None], THUMBNAIL), self._thumbnails, count)[1][0]

    def names(self, rows: Tensor) -> tuple[str, ...]:
        return tuple(self.bank.names[row] for row in rows.tolist())


def searches_by_prompt(
    desired: ReferenceBank | Mapping[str, ReferenceBank] | None, prompts: Sequence[str]
) -> dict[str, BankSearch | None]:
    """Desired images of each prompt.

    Raises:
        ValueError: a mapping lacks a prompt.
    """
    if not isinstance(desired, Mapping):
        one = None if desired is None else BankSearch(desired)
        return dict.fromkeys(prompts, one)
    missing = [prompt for prompt in prompts if prompt not in desired]
    if missing:
        raise ValueError(f"desired has no bank for the prompt {missing[0]!r}")
    return {prompt: BankSearch(desired[prompt]) for prompt in prompts}


def choose_points(
    images: Tensor,
    seeds: Sequence[int],
    undesired: BankSearch,
    desired: Sequence[BankSearch | None],
    schedule: NudgeSchedule,
    attempt: int,
) -> list[SteeringPoints]:
    """For each image: the nearest undesired points and a seeded sample of nearby desired ones."""
    # Every image gets equally many, so that one launch can nudge them all.
    count = min([schedule.nearest, *(len(one.bank) for one in desired if one is not None)])
    chosen = []
    for image, seed, toward in zip(images, seeds, desired, strict=True):
        away = undesired.nearest(image, schedule.nearest)
        pictures: Tensor | None = None
        names: tuple[str, ...] = ()
        if toward is not None:
            near = toward.nearest(image, schedule.pool)
            random = torch.Generator().manual_seed(retry_seed(seed, attempt))
            near = near[torch.randperm(len(near), generator=random)[:count]]
            pictures, names = toward.bank.images[near], toward.names(near)
        away_names = undesired.names(away)
        chosen.append(SteeringPoints(undesired.bank.images[away], away_names, pictures, names))
    return chosen
