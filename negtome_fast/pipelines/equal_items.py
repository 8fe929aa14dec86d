"""Items of a batch that the model is given twice. Pushing cannot separate them: x - x is 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, int]
"""Numbers of two items of a group; a reference r from outside of the batch is the item -1 - r."""

_ROUNDING = 1e-2
"""Largest difference between equal items, relative to the largest value."""


def equal_pairs(
    latents: Tensor, arguments: Mapping[str, Any], groups: int, references: Sequence[Tensor] = ()
) -> frozenset[Pair]:
    """Returns the pairs of equal items of a group.

    Items are equal if all that the model is given for them is. The halves of classifier-free
    guidance have other texts, of which those of one half are often equal; so a pair must be equal
    in all groups with the same latents.

    Args:
        latents: latents of the batch, items first.
        arguments: arguments of the forward by name.
        groups: guidance groups of the batch.
        references: latents (1, ...) of the references from outside of the batch, which are given
            the texts of a group's first item. If there are any, items meet only these.
    """
    batch = latents.shape[0]
    size = batch // groups
    if references:
        fit = [(n, r) for n, r in enumerate(references) if r.shape[1:] == latents.shape[1:]]
        met = [(-1 - n, i, i - i % size) for n, r in fit for i in _equal_to(latents, r[0])]
    else:
        rows = [_equal_to(latents, item) for item in latents] if size > 1 else []
        starts = [i - i % size for i in range(len(rows))]
        met = [
            (i % size, j, i)
            for i, s in enumerate(starts)
            for j in rows[i] or ()
            if i < j < s + size
        ]
    if not met:
        return frozenset()
    batched = [value for value in _batched(arguments, batch) if value is not latents]
    pairs: dict[Pair, bool] = {}
    for first, item, conditioning in met:
        same = all(torch.equal(value[item], value[conditioning]) for value in batched)
        pair = (first, item % size)
        pairs[pair] = pairs.get(pair, True) and same
    return frozenset(pair for pair, same in pairs.items() if same)


def _equal_to(latents: Tensor, item: Tensor) -> list[int]:
    """Returns the numbers of the items that equal a given one, up to rounding.

    A model rounds equal items of a batch differently, and its next steps amplify that.
    """
    near = (latents - item).abs() <= _ROUNDING * item.abs().amax()
    return near.flatten(1).all(dim=1).nonzero().flatten().tolist()


def _batched(arguments: Any, batch: int) -> Iterator[Tensor]:
    """Yields the tensors with an entry for each item."""
    if isinstance(arguments, Mapping):
        for value in arguments.values():
            yield from _batched(value, batch)
    elif isinstance(arguments, Tensor) and arguments.ndim > 1 and arguments.shape[0] == batch:
        yield arguments


def notes_on(pairs: frozenset[Pair]) -> tuple[str, ...]:
    """Returns a sentence on each set of equal items and on each reference that equals items."""
    return tuple(_notes(pairs))


def _notes(pairs: frozenset[Pair]) -> Iterator[str]:
    known: set[int] = set()
    for first in sorted({pair[0] for pair in pairs}):
        others = sorted(item for one, item in pairs if one == first)
        if first in known:
            continue
        known.update(others)
        if first < 0:
            yield (
                f"reference {-1 - first} and {_listed(others)} of a group are identical, so "
                "pushing cannot separate them; give the run another seed or the reference other "
                "latents"
            )
        else:
            yield (
                f"{_listed([first, *others])} of a group are identical, so pushing cannot separate "
                "them; give each a seed of its own"
            )


def _listed(items: Sequence[int]) -> str:
    if len(items) == 1:
        return f"item {items[0]}"
    return f"items {', '.join(map(str, items[:-1]))} and {items[-1]}"
