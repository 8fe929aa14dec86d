"""The oracle itself, against the definition written once more as plain loops.

It uses none of the project's argument handling: a mask in the wrong order or a wrong reference item
would otherwise be wrong in the oracle and in every backend alike.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import negtome_fast as nf
from helpers.cases import MODES, Case

Vector = list[float]


def cosine(a: Vector, b: Vector) -> float:
    length = max(math.hypot(*a), 1e-12) * max(math.hypot(*b), 1e-12)
    return sum(p * q for p, q in zip(a, b, strict=True)) / length


def mask_of(mask: Tensor | None, item: int, number: int, count: int, references: int) -> list[bool]:
    """Mask of reference `number` for `item`, from every documented shape of a mask."""
    if mask is None:
        return [True] * count
    if mask.dim() == 3:
        return mask[item, number].tolist()
    if mask.dim() == 2 and mask.shape[0] > 1:
        return mask[number].tolist()
    return mask.reshape(-1).tolist()


def references_of(x: Tensor, item: int, a: dict[str, Any]) -> list[tuple[Tensor, int]]:
    """(tokens, number) of every reference item that `item` meets, in order."""
    reference = a.get("reference", "first")
    if isinstance(reference, Tensor):
        own = reference[item] if reference.dim() == 4 else reference
        own = own if own.dim() == 3 else own[None]
        return [(tokens, number) for number, tokens in enumerate(own)]
    size = len(x) // a.get("groups", 1)
    start = item // size * size
    if reference == "first":
        return [] if item == start else [(x[start], start)]
    return [(x[other], other) for other in range(start, start + size) if other != item]


def value_of(value: float | Tensor, number: int) -> float:
    flat = torch.as_tensor(value).reshape(-1)
    return float(flat[number if len(flat) > 1 else 0])


def by_definition(x: Tensor, a: dict[str, Any]) -> Tensor:
    y = x.clone()
    count, source_mask = x.shape[1], a.get("source_mask")
    for item in range(len(x)):
        tokens = x[item].tolist()
        # found[i] is a list of (similarity, reference number, matched token)
        found: list[list[tuple[float, int, Vector]]] = [[] for _ in range(count)]
        met = references_of(x, item, a)
        for order, (reference, number) in enumerate(met):
            r = reference.tolist()
            allowed = mask_of(a.get("reference_mask"), item, number, len(r), len(met))
            table = [[cosine(s, t) for t in r] for s in tokens]
            for place in range(count):
                if a.get("matching", "paper") == "paper":
                    options = [(table[place][j], -j) for j in range(len(r)) if allowed[j]]
                else:
                    options = [(table[i][place], -i) for i in range(count) if allowed[place]]
                if options:
                    best, negative = max(options)
                    found[place].append((best, order, r[-negative]))
        for place in range(count):
            if source_mask is not None and not bool(source_mask.expand(x.shape[:2])[item, place]):
                continue
            chosen = found[place]
            if a.get("combine", "nearest") == "nearest" and chosen:
                chosen = [max(chosen, key=lambda match: (match[0], -match[1]))]
            for similarity, order, matched in chosen:
                if similarity > value_of(a.get("threshold", 0.65), order):
                    away = x[item, place] - torch.tensor(matched, dtype=x.dtype)
                    y[item, place] += value_of(a.get("alpha", 0.9), order) * away
    return y


@pytest.mark.parametrize("name", MODES)
def test_reference_backend_is_the_definition(name: str) -> None:
    x, arguments = Case(name, MODES[name]).make()
    x = x.double()
    if isinstance(arguments.get("reference"), Tensor):
        # Apart from each other: rounding, not the definition, would choose between equal tokens.
        reference = arguments["reference"].double()
        noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
        arguments["reference"] = reference + 1e-3 * noise
    y = nf.negtome(x, **arguments, backend="reference")
    torch.testing.assert_close(y, by_definition(x, arguments), rtol=0, atol=1e-6)
