"""Tables of launch configurations: what they may hold, which entry serves, how they are made."""

from __future__ import annotations

import copy
import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.device import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

import negtome_fast as nf
from negtome_fast import functional
from negtome_fast.cli import main
from negtome_fast.kernels import aot, tuning
from negtome_fast.kernels.tuning import Config, Problem
from negtome_fast.tuner import candidates, compile_report, measure, predict, run, space, tables

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
FLUX = Problem("bfloat16", 3, 4096, 4096, 3072)


@pytest.fixture
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose tables come before the shipped ones."""
    monkeypatch.setenv(tuning.FOLDER_VARIABLE, str(tmp_path))
    tuning.forget()
    yield tmp_path
    tuning.forget()


def shipped(arch: str = "sm_90") -> dict[str, Any]:
    return copy.deepcopy(tuning.load(tuning.FOLDER / f"{arch}.json"))


# ---------------------------------------------------------------------------------------------
# What tables hold
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", aot.TARGETS)
def test_shipped_tables_say_what_was_measured(arch: str) -> None:
    table = shipped(arch)
    assert table["arch"] == arch
    for entry in table["entries"]:
        if entry["measured"]:
            machine = entry["machine"]
            assert machine["device"] and machine["driver"] and machine["commit"]
            assert entry["microseconds"]
        else:
            assert "microseconds" not in entry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(schema=2), "schema 3"),
        (lambda t: t.update(fields=["BLOCK_M"]), '"fields" must be'),
        (lambda t: t.update(entries=[]), '"entries" must be a list'),
        (lambda t: t["entries"][0].update(dtype="int8"), "entry 0: dtype must be one of"),
        (lambda t: t["entries"][1].update(N=0), "entry 1: N must be a positive integer"),
        (lambda t: t["entries"][0].update(kind="fast"), "kind must be one of"),
        (lambda t: t["entries"][0].pop("measured"), '"measured" must be true or false'),
        (lambda t: t["entries"][0].pop("pairs"), "entry 0: pairs must be 10 integers"),
        (lambda t: t["entries"][0].update(fused=[64] * 7), "fused must be 10 integers"),
        (lambda t: t["entries"][0]["tiles"].__setitem__(0, 96), "BLOCK_M must be a power of two"),
        (
            lambda t: t["entries"][0]["tiles"].__setitem__(4, 0),
            "num_stages, GROUP_M and CTAS_PER_SM",
        ),
        (lambda t: t["entries"][0]["tiles"].__setitem__(0, True), "10 integers"),
        (lambda t: t.update(entries=t["entries"][:1]), "for float32"),
    ],
)
def test_a_table_that_is_not_right_is_one_clear_error(
    change: Any, message: str, own_tables: Path
) -> None:
    table = shipped()
    change(table)
    path = own_tables / "sm_90.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=message) as error:
        tuning.plan("sm_90", *FLUX)
    assert str(path) in str(error.value)


def test_a_table_that_is_not_json_is_named(own_tables: Path) -> None:
    (own_tables / "sm_90.json").write_text("{")
    with pytest.raises(ValueError, match=r"sm_90\.json: not JSON"):
        tuning.plan("sm_90", *FLUX)


# ---------------------------------------------------------------------------------------------
# Which entry serves
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", [*ARCHITECTURES, tuning.INTERPRETED])
def test_every_architecture_and_size_has_a_plan(arch: str) -> None:
    shipped = set(tuning.shipped_configurations(arch))
    for dtype in tuning.DTYPES:
        for size in (1, 1000, 75600):
            plan = tuning.plan(arch, dtype, 3, size, size, 640)
            assert plan.kind in tuning.KINDS
            for kernel in tuning.KERNELS:
                assert (kernel, dtype, plan.configuration(kernel)) in shipped


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="dtype must be one of"):
        tuning.plan("sm_90", "float64", 1, 1, 1, 1)
    with pytest.raises(ValueError, match="kernel must be one of"):
        tuning.plan("sm_90", *FLUX).configuration("mach")


def test_distance_is_a_symmetric_sum_of_doublings() -> None:
    assert tuning.distance(FLUX, FLUX) == 0
    assert tuning.distance(FLUX, FLUX._replace(D=1536)) == 1
    assert tuning.distance(FLUX, FLUX._replace(products=6)) == 1
    assert tuning.distance(FLUX, FLUX._replace(N=8192, M=8192)) == 3
    assert tuning.distance(FLUX, FLUX._replace(dtype="float16")) == 0.01
    assert tuning.distance(FLUX, FLUX._replace(dtype="float32")) == math.inf
    other = Problem("float16", 5, 300, 77, 640)
    assert tuning.distance(FLUX, other) == tuning.distance(other, FLUX)


def test_the_nearest_entry_serves(own_tables: Path) -> None:
    table = shipped()
    marks = {}
    for number, entry in enumerate(table["entries"]):
        entry["push_from_keys"][0] = 2**number
        marks[Problem(*(entry[name] for name in Problem._fields))] = 2**number
    (own_tables / "sm_90.json").write_text(json.dumps(table))
    for problem, mark in marks.items():
        assert mark == tuning.plan("sm_90", *problem).push_from_keys.BLOCK_M
    near = FLUX._replace(dtype="float16", N=4000, M=4200)
    assert marks[FLUX] == tuning.plan("sm_90", *near).push_from_keys.BLOCK_M
    # Only the architecture of that name: others have their shipped tables.
    assert tuning.table_path("sm_80").parent == tuning.FOLDER


# ---------------------------------------------------------------------------------------------
# Pruning
# ---------------------------------------------------------------------------------------------
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
    """A row of the compile report without a compiler: good unless `found` says otherwise."""
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
    # Of several block sizes, each the most promising first, and nothing that was not compiled.
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
    """docs/kernels.md, "What the tuner tries first"."""
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


# ---------------------------------------------------------------------------------------------
# Choosing, without a clock
# ---------------------------------------------------------------------------------------------
class FakeBench:
    """Seconds by configuration; which ones are wrong or refused."""

    def __init__(self, seconds: dict[Config, float], bad: dict[Config, str | Exception]) -> None:
        self.times, self.bad = seconds, bad

    def _forced(self) -> Config:
        return tuning.plan("sm_90", *FLUX).tiles

    def wrong(self) -> str | None:
        reason = self.bad.get(self._forced())
        if isinstance(reason, Exception):
            raise reason
        return reason

    def seconds(self) -> float:
        return self.times[self._forced()]


def test_fastest_is_the_quickest_that_is_right() -> None:
    a, b, c, d = (Config(64, 64, 32, 4, stages) for stages in (2, 3, 4, 5))
    bench = FakeBench({a: 3.0, b: 2.0, c: 1.0, d: 0.5}, {c: "wrong", d: RuntimeError("refused")})
    told: list[str] = []
    before = tuning.plan("sm_90", *FLUX)
    best = measure.fastest(bench, "tiles", "tiles", [a, b, c, d], {}, told.append, lambda: math.inf)
    assert best == (b, 2.0)
    assert "left out, wrong" in told[2] and "left out, RuntimeError: refused" in told[3]
    assert tuning.plan("sm_90", *FLUX) == before
    assert measure.fastest(bench, "tiles", "tiles", [a], {}, told.append, lambda: 0.0) is None


class SteadyBench:
    """The fused kernel takes 2 seconds, tiles 3, and tiles with the last push 1."""

    def wrong(self) -> None:
        return None

    def seconds(self) -> float:
        plan = tuning.plan("sm_90", *FLUX)
        if plan.kind == "fused":
            return 2.0
        return 1.0 if plan.push_from_keys == Config(16, 0, 256, 4, 1) else 3.0


def test_a_measured_shape_is_merged_written_and_served(own_tables: Path) -> None:
    shape = space.TokenShape(4, 4096, 3072)
    candidates = {
        "fused": [Config(64, 64, 32, 4, 2)],
        "tiles": [Config(64, 64, 64, 4, 2)],
        "pairs": [Config(64, 32, 64, 4, 2)],
        "push_from_keys": [Config(8, 0, 256, 4, 1), Config(16, 0, 256, 4, 1)],
    }
    entry = measure.tune_shape(
        shape,
        "bfloat16",
        lambda kernel, _: candidates[kernel],
        tuning.plan("sm_90", *FLUX),
        lambda *_: SteadyBench(),
        lambda line: None,
        lambda: math.inf,
    )
    assert entry is not None and entry["measured"] and entry["kind"] == "tiles"
    assert {k: Config(*entry[k]) for k in candidates} == {k: c[-1] for k, c in candidates.items()}
    assert entry["microseconds"]["push_from_keys"] == 1e6

    path = own_tables / "sm_90.json"
    table = tables.start_table(path, "sm_90")
    merged = tables.merge(table, {**entry, "machine": {"device": "none"}})
    assert len(merged["entries"]) == len(table["entries"])
    tables.write(path, merged)
    assert [file.name for file in own_tables.iterdir()] == ["sm_90.json"]
    assert tuning.plan("sm_90", *FLUX).pairs == candidates["pairs"][0]
    # What was not measured is still there, and says so.
    again = tables.start_table(path, "sm_90")
    assert sum(e["measured"] for e in again["entries"]) == 1


def test_a_table_for_another_architecture_starts_unmeasured(own_tables: Path) -> None:
    table = tables.start_table(own_tables / "sm_86.json", "sm_86")
    assert table["arch"] == "sm_86" and not any(e["measured"] for e in table["entries"])


def test_a_bad_table_is_never_written(tmp_path: Path) -> None:
    table = shipped()
    table["entries"][0]["tiles"][0] = 100
    with pytest.raises(ValueError, match="power of two"):
        tables.write(tmp_path / "sm_90.json", table)
    assert not list(tmp_path.iterdir())


def test_without_time_nothing_is_measured() -> None:
    plan = tuning.plan("sm_90", *FLUX)
    shape = space.TokenShape(4, 4096, 3072)
    arguments = (shape, "bfloat16", lambda *_: [], plan, lambda *_: SteadyBench(), print)
    assert measure.tune_shape(*arguments, lambda: 0.0) is None


def test_little_time_is_shared_by_all_kernels() -> None:
    # A clock that only the measurements move: every one of them takes a second of 20.
    many = [Config(64, 64, 32, 4, stages) for stages in range(1, 30)]
    spent: list[str] = []

    class Slow(SteadyBench):
        def seconds(self) -> float:
            spent.append(tuning.plan("sm_90", *FLUX).kind)
            return super().seconds()

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return float(len(spent))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "time", Clock)
        entry = measure.tune_shape(
            space.TokenShape(4, 4096, 3072),
            "bfloat16",
            lambda *_: many,
            tuning.plan("sm_90", *FLUX),
            lambda *_: Slow(),
            lambda line: None,
            lambda: 20.0 - len(spent),
        )
    assert entry is not None and set(entry["microseconds"]) == set(tuning.TUNED)
    assert len(spent) < 20


# ---------------------------------------------------------------------------------------------
# Correctness comes before the clock
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("reference", "kind"), [("first", "fused"), ("others", "tiles")])
def test_right_results_pass_and_wrong_ones_are_named(
    reference: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = space.TokenShape(4, 40, 24, groups=2)
    x = measure.random_tokens(shape, torch.bfloat16, torch.device(DEVICE), 0)
    y, expected, pushed = functional.guide_tokens(x, reference, groups=2, backend="torch")
    assert 0 < int((pushed >= 0).sum()) < pushed.numel()
    with measure.forced(kind):
        assert measure.wrong(x, reference, 2, expected) is None
        assert "cosine is off" in str(measure.wrong(x, reference, 2, expected + 1e-3))

    def broken(*_: Any, **__: Any) -> Any:
        moved = y.clone()
        moved[1, 3] += 1
        return moved, expected, pushed

    monkeypatch.setattr(functional, "guide_tokens", broken)
    assert measure.wrong(x, reference, 2, expected) == "item 1 was pushed wrongly"


# ---------------------------------------------------------------------------------------------
# The command, and warmup
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "4x4096"], "is not ITEMSxTOKENSxCHANNELS"),
        (["--shapes", "4x16x8/3"], "2 or more items in each"),
        (["--dry-run", "--arch", "sm_1"], "--arch must be one of sm_80"),
        (["--arch", "sm_90"], "--arch is for --dry-run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "--out", str(tmp_path / "table.json")]) == 2
    error = capsys.readouterr().err.strip()
    assert (
        "PyTorch finds none" in error and "dry_run" in error.replace("-", "_") and "\n" not in error
    )
    assert not list(tmp_path.iterdir())


def test_dry_run_lists_the_pruned_space(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some = Config(64, 64, 32, 4, 2)
    monkeypatch.setattr(tuning, "TUNED", ("tiles",))
    for module in (run, predict):
        monkeypatch.setattr(module, "space", lambda kernel: [some, Config(256, 256, 128, 4, 5)])
    predict.ordered.cache_clear()
    try:
        assert main(["tune", "--dry-run", "--arch", "sm_80", "--shapes", "2x256x64"]) == 0
    finally:
        predict.ordered.cache_clear()
    printed = capsys.readouterr().out
    assert "2x256x64 bfloat16, tiles: 1 to measure of 2" in printed
    assert "64x64x32" in printed and "256x256" not in printed


def test_warmup_runs_what_will_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def note(x: torch.Tensor, *, inplace: bool, reference: str) -> None:
        calls.append((tuple(x.shape), x.dtype, inplace, reference))

    # The package has a function of the same name as the module.
    monkeypatch.setattr(importlib.import_module("negtome_fast.warmup"), "negtome", note)
    nf.warmup([(2, 8, 4)], dtype=torch.float16, device="cpu", reference="others")
    both = [((2, 8, 4), torch.float16, inplace, "others") for inplace in (False, True)]
    assert calls == both
    with pytest.raises(ValueError, match=r"a shape must be \(B, N, D\)"):
        nf.warmup([(2, 8)], device="cpu")
    with pytest.raises(ValueError, match="leave out inplace"):
        nf.warmup([(2, 8, 4)], device="cpu", inplace=True)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_after_warmup_nothing_is_compiled_while_a_graph_is_captured() -> None:
    for reference in ("first", "others"):
        nf.warmup([(4, 300, 320)], reference=reference)
        x = measure.random_tokens(
            space.TokenShape(4, 300, 320), torch.bfloat16, torch.device("cuda"), 0
        )
        expected = nf.negtome(x, reference)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = nf.negtome(x, reference)
        graph.replay()
        assert torch.equal(y, expected)
