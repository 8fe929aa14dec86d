"""Configurations that the tuner would measure, and the order of the model that chooses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from negtome_fast.kernels import aot, tuning
from negtome_fast.kernels.tuning import Config, Problem
from negtome_fast.tuner import candidates, compile_report, predict, space

FLUX = Problem("bfloat16", 3, 4096, 4096, 3072)


@pytest.mark.parametrize("arch", aot.TARGETS)
@pytest.mark.parametrize("kernel", tuning.TUNED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_arithmetic_leaves_a_small_part_that_holds_what_is_shipped(
    arch: str, kernel: str, dtype: str
) -> None:
    every = list(space.space(kernel))
    left = {config for config in every if space.fits(config, kernel, dtype, arch)}
    assert 0 < len(left) < 0.75 * len(every)
    shipped = tuning.shipped_configurations(arch)
    # OVERLAP is no matter of the kernel; it is tried last.
    table = {c._replace(OVERLAP=0) for k, d, c in shipped if (k, d) == (kernel, dtype)}
    assert table <= left


def report_row(key: candidates.Key, **found: Any) -> dict[str, Any]:
    """A row of the compile report without a compiler: good, except for the fields `found`."""
    kernel, dtype, config = key
    row = {"target": "sm_90", "kernel": kernel, "dtype": dtype, "config": list(config)}
    row |= {
        "error": None,
        "spills": 0,
        "shared": 0,
        "shared_limit": 1,
        "narrow_offsets": 0,
        "nan_maxima": 0,
    }
    row |= {"registers": 100, "matrix_instructions": 4, "programs": 2, "triton": "0.0.0"}
    return row | found


def test_only_what_the_compile_report_accepts_is_measured() -> None:
    compiled: list[Config] = []

    def report(keys: Sequence[candidates.Key]) -> list[dict[str, Any]]:
        compiled.extend(config for *_, config in keys)
        return [report_row(key, spills=int(key[2].num_stages == 4)) for key in keys]

    reports: candidates.Rows = {}
    rows = candidates.pruned("tiles", FLUX, "sm_90", 132, 10, reports, report)
    assert len(rows) == 10 and len(compiled) > 10
    assert all(row["config"][4] != 4 for row in rows)
    # A second time everything is known.
    before = len(compiled)
    again = candidates.pruned("tiles", FLUX, "sm_90", 132, 10, reports, report)
    assert again == rows and len(compiled) == before
    # Several block sizes, most promising first, and only configurations that were compiled.
    chosen = [Config(*row["config"]) for row in rows]
    assert set(chosen) <= set(compiled) and len({config[:2] for config in chosen}) >= 3
    alike = [config for config in chosen if config[:2] == chosen[0][:2]]
    figures = [predict.predicted("tiles", config, FLUX, "sm_90", 132) for config in alike]
    assert figures == sorted(figures)


@pytest.mark.parametrize("shape", [s for s in space.SHAPES if s.tokens >= 1024], ids=str)
@pytest.mark.parametrize("kernel", ["tiles", "pairs"])
def test_the_first_candidates_for_sm_90_are_what_the_analysis_says(
    shape: space.TokenShape, kernel: str
) -> None:
    """See docs/kernels.md, "The tuner's first candidates"."""
    problem = shape.problem("bfloat16", others=kernel == "pairs")
    first = predict.ordered(kernel, problem, "sm_90", 132, candidates.QUICK)[: candidates.QUICK]
    for config in first:
        # A whole line of 128 bytes a token and step, by descriptors, enough of them in flight.
        assert config.BLOCK_K == 64 and config.DESCRIPTORS == 1, config
        # (5 stages only of small tiles, whose steps are over before the latency is.)
        small = kernel == "pairs" and config.BLOCK_M * config.BLOCK_N == 64 * 64
        assert config.num_stages in ((3, 4, 5) if small else (3, 4)), config
        assert config.GROUP_M in (8, 16), config
        # Two warps a scheduler hide each other's latency in the epilogue. (64 rows are a single
        # warpgroup's, and two of them would read all rows twice.)
        assert config.num_warps * config.CTAS_PER_SM >= 8 or config.BLOCK_M == 64, config
    assert any(config.FLATTEN for config in first)
    # The tile that reads least for its products comes first where there are enough of them for all
    # multiprocessors; 192 for 132 are too few, and there two programs share smaller ones.
    blocks = [(config.BLOCK_M, config.BLOCK_N) for config in first]
    assert len(set(blocks)) >= 3
    if kernel == "tiles":
        few = shape.tokens == 1024
        assert blocks[0] == ((128, 128) if few else (128, 256))
        assert (2 if few else 1) == first[0].CTAS_PER_SM
        assert {(128, 256), (128, 128)} <= set(blocks)
        if not few:
            assert set(blocks) == {(128, 256), (256, 128), (128, 128)}


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        # Half of a line for each token and step, and twice as many steps.
        ({}, {"BLOCK_K": 32, "num_stages": 5}),
        # Addresses are computed by the warps that start the products.
        ({}, {"DESCRIPTORS": 0, "FLATTEN": 0}),
        # The next tile's first loads wait for the epilogue.
        ({}, {"FLATTEN": 0}),
        # One step in flight does not hide the latency.
        ({"BLOCK_M": 64, "BLOCK_N": 128}, {"BLOCK_M": 64, "BLOCK_N": 128, "num_stages": 2}),
        # 3/512 of an element for each multiply-add instead of 4/512.
        ({}, {"BLOCK_M": 128, "BLOCK_N": 128}),
        # A warpgroup reads 64 rows again for every 128 columns, not for every 256.
        ({}, {"BLOCK_M": 256, "BLOCK_N": 128}),
        # One warp a scheduler leaves the latency of the epilogue open.
        ({"BLOCK_N": 128}, {"BLOCK_N": 128, "num_warps": 4}),
    ],
)
def test_the_model_prefers_for_its_reasons(better: dict[str, int], worse: dict[str, int]) -> None:
    base = Config(128, 256, 64, 8, 3, 16, 1, DESCRIPTORS=1, FLATTEN=1)
    figures = [
        predict.predicted("tiles", base._replace(**fields), FLUX, "sm_90", 132)
        for fields in (better, worse)
    ]
    assert figures[0] < figures[1]


def test_given_configurations_are_compiled_in_their_order() -> None:
    given = [
        ("scale", "float32", Config(16, 0, 64, 4, 1)),
        ("tiles", "bfloat16", Config(32, 32, 32, 4, 2)),
    ]
    rows = compile_report.report_configurations("sm_80", given)
    assert [(r["kernel"], r["dtype"], Config(*r["config"])) for r in rows] == given
    assert not any(compile_report.problems(row) for row in rows)
    with pytest.raises(ValueError, match="unknown sm_1"):
        compile_report.report_configurations("sm_1", given)
