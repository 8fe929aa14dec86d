"""Several processes give what one process gives; gloo on the CPU, as many ranks as it says."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import parallel_ranks
from parallel_ranks import on_ranks

ITEMS, TOKENS, CHANNELS = 4, 23, 8


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask(*shape: int) -> Tensor:
    return tokens(*shape, seed=5) > -0.3


def repeated() -> Tensor:
    """Every token several times, on all ranks; products of them are exact, so that they tie."""
    one_hot = torch.eye(CHANNELS)[torch.arange(TOKENS) % 5]
    return one_hot.repeat(ITEMS, 1, 1) * torch.tensor([1.0, 2.0, 0.5, 4.0])[:, None, None]


def broken() -> Tensor:
    """Tokens that are not finite, in the reference and in other items, and one that is zero."""
    x = tokens(ITEMS, TOKENS, CHANNELS)
    x[0, 3, 0], x[1, 20, 1], x[2, 3, 2], x[3, 11] = torch.inf, torch.nan, -torch.inf, 0.0
    return x


X = tokens(ITEMS, TOKENS, CHANNELS)
CASES: dict[str, dict[str, Any]] = {
    "first": {"x": X},
    "first, groups": {"x": X, "groups": 2},
    "only references": {"x": X, "groups": ITEMS},
    "first, in place": {"x": X, "inplace": True},
    "first, masks": {"x": X, "reference_mask": mask(TOKENS), "source_mask": mask(ITEMS, TOKENS)},
    "first, mask of the batch": {"x": X, "groups": 2, "reference_mask": mask(ITEMS, TOKENS)},
    "dropout": {"x": X, "dropout": 0.5, "seed": 3},
    "bf16": {"x": X.bfloat16()},
    "fp64": {"x": X.double()},
    "conditions after the image": {"x": X[:, :7], "stream": TOKENS},
    "others": {"x": X, "reference": "others"},
    "others, groups": {"x": X, "reference": "others", "groups": 2, "reference_mask": mask(TOKENS)},
    "others, sum": {"x": X, "reference": "others", "combine": "sum"},
    "external": {"x": X, "reference": tokens(11, CHANNELS, seed=1)},
    "external, two": {
        "x": X,
        "reference": tokens(2, 11, CHANNELS, seed=1),
        "alpha": torch.tensor([0.9, -0.5]),
        "reference_mask": mask(2, 11),
    },
    "external, two for each item": {
        "x": X,
        "reference": tokens(ITEMS, 2, 11, CHANNELS, seed=1),
        "combine": "sum",
        "reference_mask": mask(ITEMS, 2, 11),
    },
    "official": {"x": X, "matching": "official"},
    "official, in place": {"x": X, "matching": "official", "inplace": True, "groups": 2},
    "official, masks": {
        "x": X,
        "matching": "official",
        "reference_mask": mask(TOKENS),
        "source_mask": mask(ITEMS, TOKENS),
    },
    "official, others": {"x": X, "matching": "official", "reference": "others"},
    "official, others, sum": {
        "x": X,
        "matching": "official",
        "reference": "others",
        "combine": "sum",
    },
    "official, external": {
        "x": X,
        "matching": "official",
        "reference": tokens(2, TOKENS, CHANNELS, seed=1),
        "threshold": torch.tensor([0.3, 0.6]),
    },
    "official, conditions after the image": {
        "x": X[:, :7],
        "stream": TOKENS,
        "matching": "official",
    },
    "equal tokens": {"x": repeated()},
    "equal tokens, official": {"x": repeated(), "matching": "official"},
    "not finite": {"x": broken()},
    "not finite, official": {"x": broken(), "matching": "official"},
    "gradient": {"x": X, "weight": tokens(ITEMS, TOKENS, CHANNELS, seed=2)},
    "gradient, others": {
        "x": X,
        "weight": tokens(ITEMS, TOKENS, CHANNELS, seed=2),
        "reference": "others",
    },
    "gradient, official": {
        "x": X,
        "weight": tokens(ITEMS, TOKENS, CHANNELS, seed=2),
        "matching": "official",
    },
}
CASES = {name: {"threshold": 0.3, **case} for name, case in CASES.items()}


@functools.cache
def outcomes(ranks: int) -> list[dict[str, Any]]:
    """Of all cases, on each rank."""
    cases = {name: functools.partial(parallel_ranks.guide_part, **CASES[name]) for name in CASES}
    for name, (wanted, case) in FLUX_CASES.items():
        if wanted == ranks:
            cases[name] = functools.partial(parallel_ranks.guided_flux, **case)
    return on_ranks(ranks, parallel_ranks.every, cases)


def on_each_rank(ranks: int, name: str) -> list[Any]:
    results = [rank[name] for rank in outcomes(ranks)]
    for result in results:
        assert not isinstance(result, parallel_ranks.Failure), result
    return results


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_distributed_tokens_are_guided_as_in_one_process(name: str, ranks: int) -> None:
    """The matches are the same ones, and the numbers are equal up to the rounding of products."""
    expected = parallel_ranks.guide_alone(**CASES[name])
    parts = on_each_rank(ranks, name)
    assert all(part[0].shape[1] < TOKENS for part in parts)
    axes = (1, 1 if "gradient" in name else 2, 2)
    guided, measured, pushed = (
        torch.cat([part[i] for part in parts], dim=axis) for i, axis in enumerate(axes)
    )
    assert torch.equal(pushed, expected[2])
    torch.testing.assert_close(guided, expected[0], equal_nan=True)
    torch.testing.assert_close(measured, expected[1], equal_nan=True)
    if CASES[name].get("reference", "first") == "first" and "not finite" not in name:
        size = ITEMS // CASES[name].get("groups", 1)
        assert torch.equal(guided[::size], CASES[name]["x"][::size])
    if name != "only references":
        assert (pushed >= 0).any()


PAIR = {"ulysses_degree": 2}
UNEVEN = {"text": 5, "call": {"size": (48, 112)}}  # 21 image tokens
FLUX_CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "ulysses": (2, {"parallel": PAIR}),
    "ring": (2, {"parallel": {"ring_degree": 2}}),
    "ulysses, 4 ranks": (4, {"parallel": {"ulysses_degree": 4}}),
    "ring, 4 ranks": (4, {"parallel": {"ring_degree": 4}}),
    "both, 4 ranks": (4, {"parallel": {"ring_degree": 2, "ulysses_degree": 2}}),
    "uneven ulysses": (4, {"parallel": {"ulysses_degree": 4, "ulysses_anything": True}, **UNEVEN}),
    "uneven ring": (2, {"parallel": {"ring_degree": 2, "ring_anything": True}, **UNEVEN}),
    "others, guidance": (2, {"parallel": PAIR, "reference": "others", "call": {"cfg": True}}),
    "as the authors": (
        2,
        {"parallel": PAIR, "matching": "official", "placement": "pre_projection"},
    ),
    "groups, dropout": (2, {"parallel": PAIR, "groups": 2, "dropout": 0.5}),
    "alpha 0": (2, {"parallel": PAIR, "alpha": 0}),
}


@pytest.mark.parametrize("name", FLUX_CASES)
def test_a_context_parallel_flux_is_guided_as_in_one_process(name: str) -> None:
    """Whole runs through diffusers' `enable_parallelism`; every rank has all latents at the end."""
    ranks, case = FLUX_CASES[name]
    expected = parallel_ranks.guided_flux(**{**case, "parallel": None})
    for result in on_each_rank(ranks, name):
        torch.testing.assert_close(result["guided"], expected["guided"])
        assert torch.equal(result["after"], result["before"])
        assert unchanged(result) == unchanged(expected)
        assert_equal_summaries(result["summary"], expected["summary"])


def unchanged(result: dict[str, Any]) -> list[bool]:
    pairs = zip(result["guided"], result["before"], strict=True)
    return [torch.equal(*images) for images in pairs]


def assert_equal_summaries(result: dict[str, Any], expected: dict[str, Any]) -> None:
    """Of every block: the same tokens were compared, as many matched and pushed."""
    for row, other in zip(result["rows"], expected["rows"], strict=True):
        assert row.pop("similarity") == pytest.approx(other["similarity"], rel=1e-4)
        assert row == {key: other[key] for key in row}
    assert [result[key] for key in ("forwards", "guided", "groups")] == [
        expected[key] for key in ("forwards", "guided", "groups")
    ]
