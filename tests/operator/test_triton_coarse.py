"""Kind "coarse" of the Triton backend chooses what kind "tiles" chooses, bit for bit.

When interpreted, both add up in fp64, so that keys do not depend on the order; a token that the
int8 bounds lose would show as another choice. Configurations are small: few tokens make many tiles.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coarse import KINDS, near_a_mean, noise
from torch import Tensor

from helpers.cases import CASES, Case
from helpers.device import DEVICE
from helpers.oracle import Problem, bits

pytest.importorskip("triton", reason="Triton is not installed")

from bench.compared import coarse_statistics as statistics
from bench.compared.shapes import Shape, random_tokens
from bench.suites import coarse_columns
from negtome_fast.backends import triton_backend, triton_coarse, triton_geometry
from negtome_fast.backends.triton_geometry import plan_of
from negtome_fast.call import Call
from negtome_fast.functional import guide_tokens
from negtome_fast.kernels import tuning
from negtome_fast.kernels.tuning import Config
from negtome_fast.pairing import Pairing
from negtome_fast.tuner.measure import forced

SMALL = {
    "round": Config(32, 0, 128, 4, 1),
    "bias": Config(1, 64, 64, 4, 1),
    "bound": Config(32, 32, 64, 4, 2, GROUP_M=2),
    "select": Config(16, 16, 0, 4, 1),
    "score": Config(32, 16, 32, 4, 2),
}
OTHERS = {
    "larger blocks": {**SMALL, "bound": Config(64, 64, 128, 4, 2, GROUP_M=1)},
    "descriptors": {**SMALL, "bound": Config(16, 32, 32, 4, 2, DESCRIPTORS=1)},
    "rows split": {**SMALL, "score": Config(16, 32, 16, 4, 2), "centre": Config(16, 0, 32, 4, 1)},
    "wider scores": {**SMALL, "score": Config(64, 128, 64, 4, 2)},
}


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use this kind for everything that it can do, "others" too."""
    monkeypatch.setattr(triton_geometry, "coarse_serves", lambda *_: True)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take source tokens one block of rows at a time."""
    monkeypatch.setattr(triton_coarse, "SCRATCH_BYTES", 1)


def guided(kind: str, x: Tensor, arguments: dict[str, Any], **configurations: Config) -> tuple:
    with forced(kind, **(configurations if kind == "coarse" else {})):
        return guide_tokens(x, **arguments, backend="triton")


def assert_same(actual: tuple, expected: tuple) -> None:
    """Compare output, similarity and pushed tokens; bit for bit if interpreted.

    A GPU may add up tiles of another size in another order, and then choose otherwise between
    cosines that differ by less than that.
    """
    if DEVICE == "cuda":
        torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=1e-5)
    else:
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(bits(one), bits(other))


def paper_cases() -> list[Case]:
    found = []
    for case in CASES:
        arguments = case.make()[1] if not case.slow else {"matching": "official"}
        if arguments.get("matching") != "official" and arguments.get("combine") != "sum":
            found.append(case)
    return found


@pytest.mark.parametrize("case", paper_cases(), ids=str)
def test_every_case_is_right(case: Case, everything: None, poisoned: None) -> None:
    x, arguments = case.make(DEVICE)
    Problem(x, arguments).check_guide(*guided("coarse", x, arguments, **SMALL))


# ---------------------------------------------------------------------------------------------
# Tokens that are hard to round
# ---------------------------------------------------------------------------------------------
def tokens_of(kind: Callable[[torch.Generator], Tensor], seed: int = 0) -> Tensor:
    """Two items of 90 to 100 tokens; longer kinds keep every other token, and so their pairs."""
    x = kind(torch.Generator().manual_seed(seed)).to(DEVICE)
    return x if x.shape[1] <= 100 else x[:, ::2].contiguous()


def almost_equal(generator: torch.Generator) -> Tensor:
    """Tokens that int8 cannot tell apart: every block is in question for every row."""
    return 1 + 1e-4 * torch.randn(2, 90, 96, generator=generator)


def one_large_channel(generator: torch.Generator) -> Tensor:
    x = torch.randn(2, 90, 96, generator=generator)
    x[..., 3] = 300 * torch.randn(2, 90, generator=generator).sign()
    return x


def copies(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 10, 40, generator=generator).repeat(1, 9, 1)


def of_a_size(scale: float) -> Callable[[torch.Generator], Tensor]:
    def build(generator: torch.Generator) -> Tensor:
        return scale * torch.randn(2, 90, 96, generator=generator)

    build.__name__ = f"times {scale}"
    return build


def broken(generator: torch.Generator) -> Tensor:
    x = torch.randn(2, 90, 96, generator=generator)
    x[0, ::7, 3], x[1, ::5, 3] = float("nan"), float("inf")
    x[0, 1::7], x[1, 1::5] = 0, 0
    x[0, 2::7, 3], x[1, 2::5] = float("-inf"), 1e-30
    return x


HARD = [almost_equal, one_large_channel, copies, broken, near_a_mean]
HARD += [of_a_size(scale) for scale in (1e-30, 1e-13, 1e15, 1e30)]


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("kind", [*HARD, *KINDS], ids=lambda k: k.__name__)
def test_hard_tokens_are_matched_as_by_tiles(
    kind: Callable[[torch.Generator], Tensor], masked: bool, poisoned: None
) -> None:
    x = tokens_of(kind)
    arguments: dict[str, Any] = {}
    if masked:
        arguments["reference_mask"] = torch.arange(x.shape[1], device=DEVICE) % 3 > 0
    result = guided("coarse", x, arguments, **SMALL)
    Problem(x, arguments).check_guide(*result)
    assert_same(result, guided("tiles", x, arguments))


@pytest.mark.parametrize("change", OTHERS)
def test_result_does_not_depend_on_the_configuration(change: str, poisoned: None) -> None:
    x = tokens_of(noise)
    x[:, 70:] = x[:, 20:50]  # exact ties in other blocks
    reference = torch.cat([x[:1, 30:90], x[1:, :60]])
    for arguments in ({}, {"reference": reference, "threshold": -1.0}):
        expected = guided("coarse", x, arguments, **SMALL)
        assert_same(guided("coarse", x, arguments, **OTHERS[change]), expected)


def test_parts_give_the_result_of_the_whole(parts: None, poisoned: None) -> None:
    x = tokens_of(noise)
    references = x.flip(0)[:, :50]
    for arguments in ({}, {"reference": references}):
        result = guided("coarse", x, arguments, **SMALL)
        assert_same(result, guided("tiles", x, arguments))
    assert statistics.coarse_statistics(x)["parts"] > 1


def test_ties_go_to_the_lowest_token_and_slot(poisoned: None) -> None:
    x = tokens_of(noise)
    reference = x[:1, :20].repeat(2, 3, 1)
    result = guided("coarse", x, {"reference": reference, "threshold": -1.0}, **SMALL)
    assert int(result[2].min()) >= 0
    assert int(result[2].max()) < 20


def test_in_place_and_strided(poisoned: None) -> None:
    joint = tokens_of(noise).transpose(1, 2).contiguous().transpose(1, 2)
    x = joint[:, 30:]
    expected = guided("tiles", x.contiguous(), {})
    y = joint.clone()[:, 30:]
    with forced("coarse", **SMALL):
        numbers = torch.tensor(0.9), torch.tensor(0.65)
        call = Call(y, y, Pairing("first", 2), None, "paper", *numbers)
        similarity, pushed = triton_backend.guide(call, y)
    assert (pushed >= 0).any() or bool((expected[2] < 0).all())
    assert_same((y, similarity, pushed), expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_configurations_of_this_gpu_are_right_and_captured(dtype: torch.dtype) -> None:
    x = random_tokens(Shape("", 3, 1500, 640), dtype, DEVICE)
    result = guided("coarse", x, {})
    Problem(x, {}).check_guide(*result)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = guided("coarse", x, {})
    for _ in range(2):
        for tensor in captured:
            tensor.fill_(77)
        graph.replay()
        torch.cuda.synchronize()
        for one, other in zip(captured, result, strict=True):
            assert torch.equal(one, other)


# ---------------------------------------------------------------------------------------------
# The bounds
# ---------------------------------------------------------------------------------------------
def bounded(x: Tensor, **configurations: Config) -> Iterator[tuple[Any, ...]]:
    """Yield parts of a call "first" with their columns, layout and fp64 scores minus a . c."""
    pairing = Pairing("first", len(x))
    with forced("coarse", **configurations):
        plan = plan_of(x, x.shape[1], pairing)
    call = Call(x, x, pairing)
    layout = triton_coarse.coarse_layout(call, plan)
    scale = triton_coarse.column_scales(call)
    centre = triton_coarse._centres(x, scale, layout, plan).double()
    columns = x[0].double() * scale[0, : x.shape[1]].clamp_min(0).double()[:, None]
    for part, rounded in triton_coarse.source_parts(call, scale, layout, plan):
        rows = x[1:, part.first : part.first + part.lower.shape[1]].double()
        # The scale is the kernel's own, since its bounds refer to that.
        norm = rows.float().square().sum(dim=2, keepdim=True).sqrt().clamp_min(1e-12).double()
        yield part, rounded, layout, (rows / norm) @ columns.T - (rows / norm) @ centre[0][:, None]


def check_bounds(x: Tensor) -> float:
    """Check the bounds of every pair and block; return the widest gap between a block's bounds."""
    widest = 0.0
    for part, columns, layout, exact in bounded(x, **SMALL):
        scale, length, error = part.rounded.stats.double()
        t, column_length, column_error, offset = columns.stats[:, 0].double()
        product = part.rounded.values.double() @ columns.values[0].double().T
        score = product * scale[:, :, None] * t + offset
        reach = error[:, :, None] * column_length + length[:, :, None] * column_error
        reach += layout.channels * triton_coarse.TERM_ERROR * column_length + 2.0**-13
        # 2^-20 covers the rounding of the test's own norms.
        assert torch.all((score - exact).abs() <= reach + 2.0**-20)

        blocks = exact.split(layout.bound.BLOCK_N, dim=2)
        best = torch.stack([block.amax(dim=2) for block in blocks], dim=1)
        upper = part.upper.view(best.shape).double()
        lower = statistics.lower_bounds(part).double()
        assert torch.all(upper >= best - 2.0**-20)
        assert torch.all(lower <= exact.amax(dim=2) + 2.0**-20)
        assert torch.all(upper.amax(dim=1) > lower)
        widest = max(widest, float((upper - best).max()))
    return widest


@pytest.mark.parametrize("kind", [*HARD[:3], near_a_mean, *KINDS], ids=lambda k: k.__name__)
def test_bounds_hold(kind: Callable[[torch.Generator], Tensor]) -> None:
    check_bounds(tokens_of(kind, seed=3))


def test_bounds_are_narrow_where_tokens_are_even() -> None:
    assert check_bounds(tokens_of(noise)) < 0.1
    assert check_bounds(tokens_of(near_a_mean)) < 0.1


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    channels=st.integers(1, 150),
    tokens=st.integers(1, 70),
    spread=st.floats(0, 4),
    mean=st.floats(0, 30),
    exponent=st.integers(-9, 9),
)
def test_bounds_hold_for_any_tokens(
    seed: int, channels: int, tokens: int, spread: float, mean: float, exponent: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, channels, generator=generator)
    x = x * torch.exp(spread * torch.randn(channels, generator=generator))
    x += mean * torch.randn(channels, generator=generator)
    check_bounds((x * 10.0**exponent).to(DEVICE))


# ---------------------------------------------------------------------------------------------
# Statistics, and the calls that take this kind
# ---------------------------------------------------------------------------------------------
def test_statistics_count_what_is_in_question() -> None:
    x = torch.cat([tokens_of(noise)[:1], tokens_of(noise, seed=1)])
    x[1, 5] = float("nan")
    x[2] = x[0] + 0.3 * x[2]  # a clear match each
    with forced("coarse", **SMALL):
        found = statistics.coarse_statistics(x, sample=10**6)
    counts, blocks = [], []
    for part, columns, layout, _ in bounded(x, **SMALL):
        rows = (part.rounded.stats[0] > 0).nonzero()
        blocks += statistics.in_question_of(part).view(2, -1, 100).sum(1)[tuple(rows.T)].tolist()
        counts += statistics.columns_in_question(part, columns, layout, rows, size=64).tolist()
    assert found["rows"] == len(counts) == 199 and found["columns"] == 100
    assert found["columns_max"] == max(counts) and found["blocks_max"] == max(blocks)
    assert found["columns_mean"] == pytest.approx(sum(counts) / len(counts))
    assert found["blocks_mean"] == pytest.approx(sum(blocks) / len(blocks))
    assert 1 <= found["blocks_mean"] <= found["columns_mean"] < 20
    with forced("coarse", **SMALL):
        clear = statistics.coarse_statistics(x[::2])
    assert clear["columns_mean"] == clear["blocks_mean"] == 1 and clear["undecided"] == 0
    assert found["scored"] < 1 and found["parts"] == 1 and found["scratch_bytes"] > 3 * 100 * 96


def test_rows_in_which_nothing_can_be_told_apart_are_scored_completely() -> None:
    x = tokens_of(almost_equal)
    with forced("coarse", **SMALL):
        found = statistics.coarse_statistics(x)
    assert found["undecided"] == 1 and found["blocks_mean"] == 3 and found["scored"] >= 1
    assert found["columns_mean"] > 80


def test_statistics_of_references_and_masks() -> None:
    x = tokens_of(noise)
    references = tokens_of(noise, seed=1)[:, :70]
    nothing = torch.zeros(2, 70, dtype=torch.bool, device=DEVICE)
    with forced("coarse", **SMALL):
        found = statistics.coarse_statistics(x, references)
        none = statistics.coarse_statistics(x, references, reference_mask=nothing)
    assert found["columns"] == 140 and found["rows"] == 200 and found["blocks_mean"] >= 1
    assert none["blocks_max"] == none["columns_max"] == none["scored"] == 0


def test_statistics_of_nothing_are_refused() -> None:
    x = tokens_of(noise)
    with pytest.raises(ValueError, match="nothing to match"):
        statistics.coarse_statistics(x[:1])
    with pytest.raises(ValueError, match="32768 channels; at most 32767"):
        statistics.coarse_statistics(torch.zeros(2, 1, 2**15, device=DEVICE))


@pytest.mark.parametrize(
    ("pairing", "channels", "coarse"),
    [
        (Pairing("first", 2), 96, True),
        (Pairing("external", 2), 96, True),
        (Pairing("others", 2), 96, False),
        (Pairing("first", 2), 2**15, False),
    ],
)
def test_who_takes_this_kind(
    pairing: Pairing, channels: int, coarse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[bool] = []
    monkeypatch.setattr(triton_coarse, "raise_keys", lambda *_: launched.append(True))
    monkeypatch.setattr(triton_backend, "_tiles", lambda *_: launched.append(False) or [])
    x = torch.zeros(2, 1, channels, device=DEVICE)
    with forced("coarse"):
        numbers = torch.tensor(0.9), torch.tensor(0.6)
        call = Call(x, x, pairing, None, "paper", *numbers)
        triton_backend.guide(call, torch.empty_like(x))
    assert launched == [coarse]


def test_memory_of_long_videos_is_bounded() -> None:
    video = torch.empty(1, 1, 1).expand(2, 75600, 5120)
    plan = tuning.plan("sm_90", "bfloat16", 1, 75600, 75600, 5120)
    layout = triton_coarse.coarse_layout(Call(video, video, Pairing("first", 2)), plan)
    row = layout.width + 16 + 8 * layout.column_blocks
    assert layout.rows * row <= triton_coarse.SCRATCH_BYTES and layout.rows % 128 == 0
    # The last part is nearly as long as the others.
    count = -(-75600 // layout.rows)
    assert 75600 - (count - 1) * layout.rows > layout.rows - 128 * count


def test_a_table_may_name_it_and_no_shipped_table_does(tmp_path: Path, monkeypatch) -> None:
    for path in tuning.FOLDER.glob("*.json"):
        assert all(entry["kind"] != "coarse" for entry in tuning.load(path)["entries"])
    table = tuning.load(tuning.FOLDER / "sm_90.json")
    for entry in table["entries"]:
        entry["kind"] = "coarse"
    (tmp_path / "sm_90.json").write_text(json.dumps(table))
    monkeypatch.setenv(tuning.FOLDER_VARIABLE, str(tmp_path))
    tuning.forget()
    try:
        plan = tuning.plan("sm_90", "bfloat16", 1, 75600, 75600, 5120)
    finally:
        monkeypatch.undo()
        tuning.forget()
    assert plan.kind == "coarse" and plan.bound.BLOCK_N == 256


@pytest.mark.parametrize(
    "arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942", tuning.INTERPRETED]
)
@pytest.mark.parametrize("dtype", tuning.DTYPES)
def test_configurations_fit_each_other(arch: str, dtype: str) -> None:
    plan = tuning.plan(arch, dtype, 1, 75600, 75600, 5120)
    assert triton_coarse.STEP % plan.bound.BLOCK_K == 0
    assert plan.bound.BLOCK_N % plan.score.BLOCK_N == 0


def test_benchmark_is_rehearsed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "coarse.json"
    shapes = ["2x70x64", "4x40x64/2"]
    code = coarse_columns.main(["--shapes", *shapes, "--seconds", "0", "--out", str(path)])
    assert code == 0
    cases = json.loads(path.read_text())["coarse_columns"]
    assert [case["shape"] for case in cases] == shapes
    for case in cases:
        assert case["alike"] == 1 and case["rehearsal"] is (DEVICE == "cpu")
        assert case["in_question"]["columns_mean"] >= 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all("tiles / coarse" in line for line in printed)
