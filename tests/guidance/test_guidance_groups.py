"""Guidance parts, groups within them, their order and branches, in hand-written loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from negtome_fast.config import NegToMeConfig, ReferenceSettings
from negtome_fast.functional import negtome
from negtome_fast.guidance import Guidance


def tokens(items: int, seed: int = 0) -> Tensor:
    return torch.randn(items, 12, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reference", ["first", "others"])
@pytest.mark.parametrize(
    ("configured", "parts", "groups", "total"),
    [(None, 1, 2, 2), (None, 2, 2, 4), (None, 2, 1, 2), (2, 2, 1, 4), (1, 2, 2, 2)],
)
def test_groups_are_counted_within_each_part(
    reference: Any, configured: int | None, parts: int, groups: int, total: int
) -> None:
    guidance = Guidance(NegToMeConfig(threshold=0.1, reference=reference, groups=configured))
    guidance.begin_step(1000, parts=parts, groups=groups)
    guided = guidance.apply(tokens(8))
    assert guidance.groups == total
    guidance.end_step()
    assert (guidance.summary().parts, guidance.summary().groups) == (parts, total)
    torch.testing.assert_close(guided, negtome(tokens(8), reference, threshold=0.1, groups=total))


def test_the_summary_names_parts_and_groups() -> None:
    told = []
    for parts, groups in ((1, 1), (1, 3), (2, 1), (3, 2)):
        guidance = Guidance(NegToMeConfig(threshold=0.1))
        guidance.begin_step(1000, parts=parts, groups=groups)
        guidance.apply(tokens(12))
        told.append(guidance.summary().grouping)
    assert told == [
        "1 guidance group in the batch",
        "3 guidance groups in the batch",
        "2 guidance parts, 1 group in each",
        "3 guidance parts, 2 groups in each",
    ]
    assert Guidance().summary().grouping == ""


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("inplace", [False, True])
def test_items_may_lie_in_any_order(references: int, inplace: bool) -> None:
    config = NegToMeConfig(threshold=0.1)
    order, x, seen = torch.tensor([0, 2, 4, 1, 3, 5]), tokens(6), tokens(2 * references, seed=1)

    def guided(x: Tensor, order: Tensor | None) -> Tensor:
        guidance = Guidance(config, references=[ReferenceSettings()] * references)
        guidance.begin_step(1000, parts=2, order=order)
        if references:
            with guidance.record():
                guidance.apply(seen)
        return guidance.apply(x, inplace=inplace)

    expected = guided(x[order].clone(), None)
    result = guided(x.clone(), order)
    torch.testing.assert_close(result[order], expected)
    assert not torch.equal(result, x)


@pytest.mark.parametrize("ordered", [False, True])
def test_branches_are_apart(ordered: bool) -> None:
    order = torch.tensor([0, 2, 1, 3]) if ordered else None
    guidance = Guidance(NegToMeConfig(threshold=0.1))
    guidance.begin_step(1000, parts=2, order=order)
    x = tokens(12)
    result = guidance.apply(x.clone(), branches=3)
    expected = torch.cat([guidance.apply(part.clone()) for part in x.chunk(3)])
    torch.testing.assert_close(result, expected)
