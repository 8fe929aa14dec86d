"""The bootstrap against known distributions, and the page of measured coverage."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from negtome_fast.studies import measures
from negtome_fast.studies.intervals import (
    AttributeEntropy,
    BootstrapPlan,
    FrechetTo,
    InceptionScore,
    Interval,
    Mean,
    PairwiseCosine,
    bootstrap,
    paired_bootstrap,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Draws

STRATA = [item // 24 for item in range(96)]
BLOCKS = [item // 8 for item in range(96)]


def test_a_common_offset_cancels() -> None:
    noise = np.random.default_rng(0).normal(size=96) * 100
    found = paired_bootstrap(Mean(), noise + 1, noise)
    assert (found.estimate, found.low, found.high) == pytest.approx((1, 1, 1))
    unpaired = paired_bootstrap(Mean(), noise + 1, noise[::-1].copy())
    assert unpaired.high - unpaired.low > 20
    assert found.verdict == "higher" and unpaired.verdict == "no change seen"


def test_blocks_are_drawn_whole_and_strata_keep_their_size() -> None:
    drawn: list[tuple[int, ...]] = []

    def spy(samples: list[int]) -> float:
        drawn.append(tuple(samples))
        return float(sum(samples))

    paired_bootstrap(spy, list(range(96)), list(range(96)), strata=STRATA, blocks=BLOCKS, draws=50)
    once, draws = drawn[0], drawn[1:51]
    assert sorted(once) == list(range(96))
    for draw in draws:
        counts = np.bincount(draw, minlength=96)
        by_block = counts.reshape(12, 8)
        assert (by_block == by_block[:, :1]).all()
        # One block fewer than the three of each stratum, see the module.
        assert counts.reshape(4, 24).sum(1).tolist() == [16] * 4
    assert len(set(draws)) > 40
    # The other side is the same items, in the same order.
    assert drawn[51] == once and drawn[52:] == draws


def test_blocks_may_be_named_anew_in_every_stratum() -> None:
    values = np.random.default_rng(0).normal(size=(2, 96))
    within = [block % 3 for block in BLOCKS]
    kwargs: dict[str, Any] = {"strata": STRATA, "draws": 100}
    assert paired_bootstrap(Mean(), *values, blocks=within, **kwargs) == paired_bootstrap(
        Mean(), *values, blocks=BLOCKS, **kwargs
    )


def test_draws_follow_from_the_seed() -> None:
    values = np.random.default_rng(0).normal(size=(2, 96))
    one, again, other = (paired_bootstrap(Mean(), *values, draws=200, seed=s) for s in (3, 3, 4))
    assert one == again
    assert one.estimate == other.estimate and one.low != other.low


# Fast statistics


def some_readings(seed: int, spread: float) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    draws = (rng.random((96, 2)) ** (1 / spread) * 4).astype(int)
    return [{"skin": "abcd"[i], "hair_color": "wxyz"[j]} for i, j in draws]


FEATURES = [torch.rand(96, 12, generator=generator(s), dtype=torch.float64) for s in (0, 1)]


@pytest.mark.parametrize(
    ("statistic", "samples"),
    [
        (Mean(), [rows[:, 0] for rows in FEATURES]),
        (AttributeEntropy(("skin", "hair_color")), [some_readings(0, 1), some_readings(1, 3)]),
        (InceptionScore(), [10 * rows for rows in FEATURES]),
    ],
    ids=["mean", "entropy", "inception"],
)
@pytest.mark.parametrize("within", [False, True], ids=["pooled", "within prompts"])
@pytest.mark.parametrize("compare", ["difference", "ratio"])
def test_fast_statistics_equal_one_call_a_draw(
    statistic: Any, samples: list[Any], within: bool, compare: Any
) -> None:
    kwargs: dict[str, Any] = {"strata": STRATA, "blocks": BLOCKS, "within_strata": within}
    fast = paired_bootstrap(statistic, *samples, draws=40, compare=compare, **kwargs)
    slow = paired_bootstrap(statistic.__call__, *samples, draws=40, compare=compare, **kwargs)
    if isinstance(statistic, Mean) and compare == "difference":
        # A plain function counts as biased, so its interval is moved.
        slow = replace(slow, low=slow.low + slow.bias, high=slow.high + slow.bias, bias=0.0)
    for name in ("estimate", "low", "high", "bias"):
        assert getattr(fast, name) == pytest.approx(getattr(slow, name), rel=1e-9, abs=1e-12)
    assert fast.low < fast.high


def test_pairwise_cosine_leaves_out_pairs_of_copies() -> None:
    rows = FEATURES[0][:9]
    blocks = torch.arange(9) // 3
    cosines = torch.nn.functional.normalize(rows, dim=-1)
    cosines = cosines @ cosines.T
    # Blocks 0, 0, 2: pairs within each of the three, and of 0 with 2, twice; none of 0 with 0.
    pairs = [
        float(cosines[i, j])
        for first, second in ((0, 0), (0, 0), (2, 2), (0, 2), (0, 2))
        for i in range(3 * first, 3 * first + 3)
        for j in range(3 * second, 3 * second + 3)
        if first != second or i < j
    ]
    weighted = PairwiseCosine().weighted(rows, blocks)
    found = weighted(torch.tensor([[2.0, 0.0, 1.0], [1.0, 1.0, 1.0]]).double())
    assert float(found[0]) == pytest.approx(sum(pairs) / len(pairs))
    assert float(found[1]) == pytest.approx(measures.mean_pairwise_cosine(rows))


@pytest.mark.parametrize("channels", [12, 300], ids=["more rows", "more channels"])
def test_frechet_distance_of_a_draw_is_that_of_its_rows(channels: int) -> None:
    a, real = (torch.rand(48, channels, generator=generator(s)).double() for s in (0, 1))
    counts = torch.tensor([2, 0, 1, 1, 1, 1])
    rows = a.repeat_interleave(counts.repeat_interleave(8), 0)
    weighted = FrechetTo(real).weighted(a, torch.arange(48) // 8)
    found = weighted(torch.stack([counts, torch.ones(6)]).double())
    assert float(found[0]) == pytest.approx(measures.frechet_distance(rows, real), rel=1e-6)
    assert float(found[1]) == pytest.approx(FrechetTo(real)(a), rel=1e-6)


# Intervals


def test_intervals_of_groups_cover_the_truth_and_those_of_single_images_do_not() -> None:
    rng = np.random.default_rng(0)
    hits, naive_hits, runs = 0, 0, 300
    for run in range(runs):
        # 4 prompts of 3 groups of 8 images, which have half of their variance in common.
        common = rng.normal(size=(12, 1)).repeat(8, 1).ravel()
        a, b = common + rng.normal(size=96) + 0.3, rng.normal(size=96)
        grouped = paired_bootstrap(Mean(), a, b, strata=STRATA, blocks=BLOCKS, draws=200, seed=run)
        naive = paired_bootstrap(Mean(), a, b, strata=STRATA, draws=200, seed=run)
        hits += grouped.contains(0.3)
        naive_hits += naive.contains(0.3)
    # A share of 95% in 300 runs has a standard deviation of 1.3%.
    assert 0.91 <= hits / runs <= 0.98
    assert naive_hits / runs < 0.8


def test_intervals_of_a_ratio_of_entropies_cover_the_truth() -> None:
    rng = np.random.default_rng(0)
    often, rare = [0.3, 0.25, 0.2, 0.15, 0.1], [0.9, 0.06, 0.02, 0.01, 0.01]
    truth = float(np.divide(*(-np.dot(p, np.log(p)) for p in (often, rare))))
    hits, centred, runs = 0, 0, 200
    corrected: list[float] = []
    plain: list[float] = []
    strata, blocks = [i // 64 for i in range(256)], [i // 8 for i in range(256)]
    statistic = AttributeEntropy(("skin",))
    for run in range(runs):
        a, b = ([{"skin": v} for v in rng.choice(list("abcde"), 256, p=p)] for p in (often, rare))
        plan = BootstrapPlan.of(256, strata, blocks, 300, run)
        (value_a, drawn_a), (value_b, drawn_b) = (plan.apply(statistic, s, True) for s in (a, b))
        found = plan.ratio(value_a, value_b, drawn_a, drawn_b)
        hits += found.contains(truth)
        low, high = np.quantile(drawn_a / drawn_b, (0.025, 0.975))
        centred += low <= truth <= high
        corrected.append(found.corrected)
        plain.append(found.estimate)
    assert 0.92 <= hits / runs <= 0.99
    # The correction takes off more than half of the excess.
    assert np.mean(plain) - truth > 2 * abs(np.mean(corrected) - truth)
    # The bias of small entropies is what quantiles as they are do not see.
    assert centred / runs < 0.9


def test_verdicts() -> None:
    def interval(low: float, high: float, no_change: float | None = 0.0) -> Interval:
        return Interval((low + high) / 2, low, high, 96, 12, 100, 0.0, no_change)

    assert interval(-1, 2).verdict == "no change seen"
    assert interval(0, 2).verdict == "no change seen"
    assert interval(0.1, 2).verdict == "higher"
    assert interval(-2, -0.1).verdict == "lower"
    assert interval(0.5, 0.9, 1.0).verdict == "lower"
    assert interval(0.5, 1.2, 1.0).verdict == "no change seen"
    with pytest.raises(ValueError, match="compares nothing"):
        _ = interval(0, 1, None).verdict


def test_one_image_that_changed_is_no_change_of_a_mean() -> None:
    before = [1.0] * 64
    for changed in range(64):
        after = [1.0 - (i == changed) for i in range(64)]
        found = paired_bootstrap(Mean(), after, before, seed=changed)
        assert found.high == 0 and found.verdict == "no change seen"


def test_one_condition_has_an_interval_too() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = bootstrap(Mean(), values, draws=2000)
    error = values.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx(
        (values.mean() - 1.966 * error, values.mean() + 1.966 * error), abs=0.15 * error
    )
    assert found.no_change is None and found.samples == found.blocks == 400


def test_a_ratio_with_zeros_in_some_draws_keeps_to_quantiles() -> None:
    rare = np.zeros(96)
    rare[:3] = 1
    found = paired_bootstrap(Mean(), rare, np.ones(96), compare="ratio")
    assert found.estimate == pytest.approx(1 / 32)
    assert found.low == 0 and 0 < found.high < 0.2
    assert math.isinf(paired_bootstrap(Mean(), np.ones(96), rare, compare="ratio").high)
    with pytest.raises(ValueError, match="nothing to nothing in some draws"):
        paired_bootstrap(Mean(), rare, rare, compare="ratio")
    with pytest.raises(ValueError, match="positive statistics, got 1 to 0"):
        paired_bootstrap(Mean(), np.ones(96), np.zeros(96), compare="ratio")


def test_draws_that_failed_do_not_move_the_interval() -> None:
    plan = BootstrapPlan.of(96, STRATA, BLOCKS, 100, 0)
    failed = np.arange(100) < 20
    drawn_a = np.where(failed, 1.0, 3.0 + 0.01 * np.arange(100))
    moved = plan.ratio(3.5, 1.0, drawn_a, np.ones(100))
    kept = plan.ratio(3.5, 1.0, drawn_a, np.ones(100), recentre=False)
    assert moved.low > 1 and kept.low == 1
    assert kept.high < 4 < moved.high
    assert kept.corrected == kept.estimate == 3.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_b": np.zeros(95)}, "as many on both sides, got 96 and 95"),
        ({"strata": STRATA[:-1]}, "strata must name 96 samples, got 95"),
        ({"blocks": BLOCKS[:-1]}, "blocks must name 96 samples, got 95"),
        ({"blocks": STRATA}, "at least 2 independent blocks .* stratum 0 has 1 of 24 samples"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"compare": "product"}, "'difference' or 'ratio', got 'product'"),
        ({"samples_b": np.full(96, np.nan)}, "not finite"),
        ({"samples_b": np.zeros((96, 2))}, "one number a sample"),
        ({"samples_a": [], "samples_b": [], "strata": [], "blocks": None}, "needs samples"),
    ],
    ids=["counts", "strata", "blocks", "one block", "draws", "compare", "nan", "shape", "none"],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "samples_a": np.zeros(96),
        "samples_b": np.ones(96),
        "strata": STRATA,
        "blocks": BLOCKS,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(Mean(), **arguments)


# The page

DOCS = Path(__file__).parents[2] / "docs"


def test_page_shows_the_simulated_coverage_and_its_code_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from docs.render import coverage as rendered
    from docs.render.pages import render
    from negtome_fast.studies.studies import coverage

    page = (DOCS / "measures.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "measures.md", "exec"), {})
    assert capsys.readouterr().out.count("\n") == 5

    assert render("docs/measures.md", page) == page
    out = tmp_path / "eval" / "coverage.json"
    assert coverage.main(["--runs", "2", "--out", str(out)]) == 0
    table = rendered.table(json.loads(out.read_text(encoding="utf-8")))
    assert table in render("docs/measures.md", page, tmp_path)
    assert table not in page
