"""The images of a condition, with their features and what the attribute reader sees in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..models.reader import HEADS
from .conditions import Condition, Group

ARRAYS = ("images", "features", "indices", "seconds")
"""Fields of `Samples` that are stored for each batch."""


@dataclass(frozen=True)
class Samples:
    """The images of a condition and their measurements, in the plan's order.

    Attributes:
        condition: how the images were made.
        images: uint8 (N, 3, 64, 64).
        features: fp32 (N, 1280), from `FeatureExtractor`.
        indices: int (N, heads), the reader's class for each head of `HEADS`.
        prompts: prompt of each image.
        seeds: seed of each image.
        groups: int (N,), number of each image's group, from 0.
        seconds: (N,), sampling time of the batch divided by its images. Times of a busy machine
            mean nothing.
        pushed: share of tokens that the guidance pushed; NaN without guidance.
        similarity: mean best cosine that the guidance saw; NaN without guidance.
    """

    condition: Condition
    images: np.ndarray
    features: np.ndarray
    indices: np.ndarray
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    groups: np.ndarray
    seconds: np.ndarray
    pushed: float
    similarity: float

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def readings(self) -> list[dict[str, str]]:
        """The reader's value of every head, one dictionary per image."""
        return [
            {head: values[i] for (head, values), i in zip(HEADS.items(), row, strict=True)}
            for row in self.indices.tolist()
        ]

    def pixels(self) -> Tensor:
        """Return the images as fp32 (N, 3, 64, 64) in [0, 1]."""
        return torch.from_numpy(self.images).float() / 255

    def only(self, at: Sequence[int]) -> Samples:
        """Return the samples at the indices `at`."""
        where = list(at)
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in where),
            seeds=tuple(self.seeds[i] for i in where),
            groups=self.groups[where],
            **{name: getattr(self, name)[where] for name in ARRAYS},
        )

    @classmethod
    def from_batches(
        cls,
        condition: Condition,
        groups: Sequence[Group],
        batches: Sequence[Mapping[str, np.ndarray]],
    ) -> Samples:
        """Return the samples of `groups` from the stored arrays of their batches."""
        tokens, pushed, similarity = np.array([batch["guidance"] for batch in batches]).T
        count = tokens.sum()
        nan = float("nan")
        return cls(
            condition=condition,
            prompts=tuple(group.prompt for group in groups for _ in group.seeds),
            seeds=tuple(seed for group in groups for seed in group.seeds),
            groups=np.repeat(np.arange(len(groups)), [len(group.seeds) for group in groups]),
            pushed=float(tokens @ pushed / count) if count else nan,
            similarity=float(tokens @ similarity / count) if count else nan,
            **{name: np.concatenate([batch[name] for batch in batches]) for name in ARRAYS},
        )

    @classmethod
    def joined(cls, parts: Sequence[Samples], name: str) -> Samples:
        """Return all parts as one condition called `name`; their groups stay apart.

        The parts are one condition with different references or prompts.
        """
        firsts = np.cumsum([0, *(part.groups.max() + 1 for part in parts)])
        weights = np.array([len(part) for part in parts])
        return cls(
            condition=replace(parts[0].condition, name=name),
            prompts=tuple(prompt for part in parts for prompt in part.prompts),
            seeds=tuple(seed for part in parts for seed in part.seeds),
            groups=np.concatenate([p.groups + f for p, f in zip(parts, firsts, strict=False)]),
            pushed=float(np.average([part.pushed for part in parts], weights=weights)),
            similarity=float(np.average([part.similarity for part in parts], weights=weights)),
            **{a: np.concatenate([getattr(part, a) for part in parts]) for a in ARRAYS},
        )
