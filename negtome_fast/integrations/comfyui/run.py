"""`Run`: one sampling run, as ComfyUI's sampler was called, and what the user is told of it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

_LOG = logging.getLogger(__name__)
_EQUAL = 0.01
"""Largest difference of two latents that make the same picture."""


@dataclass
class Run:
    """One sampling run.

    Attributes:
        title: name of the node that guides it.
        noise: (B, C, ...), the noise of its B images.
        sigmas: its schedule, with the sigma that it ends at; empty if it is not known.
        seed: its seed.
        prompts: number of the prompt of each image.
        twins: images that begin with the same noise and latents, two or more in each entry.
        forwards: sigma of each model forward so far.
        guided: number of them that were guided.
        blocks: the most attention modules that one of them ran.
        notes: what the user was told.
    """

    title: str
    noise: torch.Tensor
    sigmas: tuple[float, ...]
    seed: int
    prompts: tuple[int, ...]
    twins: tuple[tuple[int, ...], ...]
    forwards: list[float] = field(default_factory=list)
    guided: int = 0
    blocks: int = 0
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, title: str, executor: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Run:
        """Reads the arguments of a wrapper of OUTER_SAMPLE."""
        given = inspect.signature(executor.original).bind(noise, *args, **kwargs).arguments
        sigmas, latents = given.get("sigmas"), given.get("latent_image")
        conditions = getattr(executor.class_obj, "conds", None) or {}
        return cls(
            title,
            noise,
            () if sigmas is None else tuple(map(float, sigmas.tolist())),
            given.get("seed") or 0,
            prompt_numbers(conditions, len(noise)),
            _twins(noise, latents),
        )

    @property
    def items(self) -> int:
        """Number of images."""
        return len(self.noise)

    @property
    def prompt_groups(self) -> int | None:
        """Number of equal contiguous parts of one prompt each; None if there are no such parts."""
        count = len(set(self.prompts))
        size, rest = divmod(self.items, count)
        parts = [self.prompts[first : first + size] for first in range(0, self.items, size)]
        return None if rest or any(len(set(part)) > 1 for part in parts) else count

    def tell(self, text: str) -> None:
        """Logs a warning, which ComfyUI shows, and keeps it for the node *NegToMe info*."""
        self.notes.append(text)
        _LOG.warning("%s: %s", self.title, text)

    def tell_equal_images(self, samples: Any) -> None:
        """Tells which images began equal and came out equal."""
        if not isinstance(samples, torch.Tensor):
            return
        for twins in self.twins:
            first, *others = twins
            same = [one for one in others if _close(samples[first], samples[one])]
            if same:
                self.tell(
                    f"images {_numbers((first, *same))} of the batch begin with the same noise and "
                    "came out equal, because an image cannot be pushed from an equal one. Give "
                    "each its own noise: seed_behavior=random in Latent Batch Seed Behavior, or "
                    "let the sampler add the noise"
                )


def prompt_numbers(conditions: Mapping[str, Iterable[Any]], items: int) -> tuple[int, ...]:
    """Returns the number of the prompt of each image, in the order in which prompts appear.

    Args:
        conditions: a guider's `conds`: lists of dictionaries with `cross_attn` (b, T, D) and
            `pooled_output` (b, D). ComfyUI repeats b rows until there is one for each image.
        items: number of images.
    """
    keys: list[tuple[int, ...]] = [()] * items
    for condition in (one for of_kind in conditions.values() for one in of_kind):
        for name in ("cross_attn", "pooled_output"):
            rows = condition.get(name)
            if isinstance(rows, torch.Tensor) and rows.ndim > 1 and len(rows) > 1:
                numbers = _same_rows(rows[:items])
                keys = [(*key, numbers[i % len(numbers)]) for i, key in enumerate(keys)]
    order = list(dict.fromkeys(keys))
    return tuple(order.index(key) for key in keys)


def _same_rows(rows: torch.Tensor) -> list[int]:
    """Returns for each row the index of the first row that equals it."""
    firsts: list[int] = []
    for i, row in enumerate(rows):
        equal = (j for j in dict.fromkeys(firsts) if torch.equal(rows[j], row))
        firsts.append(next(equal, i))
    return firsts


def _twins(noise: Any, latents: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(noise, torch.Tensor):
        return ()
    keys = list(zip(_same_rows(noise), _rows_of(latents, len(noise)), strict=True))
    alike = (tuple(i for i, one in enumerate(keys) if one == key) for key in dict.fromkeys(keys))
    return tuple(found for found in alike if len(found) > 1)


def _rows_of(latents: Any, items: int) -> list[int]:
    if not isinstance(latents, torch.Tensor) or len(latents) != items:
        return [0] * items
    return _same_rows(latents)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(torch.allclose(one.float(), other.float(), rtol=0, atol=_EQUAL))


def _numbers(indices: Sequence[int]) -> str:
    """Returns the numbers from 1 as a user counts: "1 and 3", "1, 2 and 4"."""
    *firsts, last = (str(index + 1) for index in indices)
    return f"{', '.join(firsts)} and {last}" if firsts else last
