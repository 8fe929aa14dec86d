"""Tables of launch configurations: valid content, the entry that serves, and measured entries."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.device import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from negtome_fast import functional
from negtome_fast.kernels import aot, tuning
from negtome_fast.kernels.tuning import Config, Problem
from negtome_fast.tuner import measure, space, tables

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
FLUX = Problem("bfloat16", 3, 4096, 4096, 3072)


@pytest.fixture
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose tables replace the shipped ones."""
    monkeypatch.setenv(tuning.FOLDER_VARIABLE, str(tmp_path))
    tuning.forget()
    yield tmp_path
    tuning.forget()


def shipped(arch: str = "sm_90") -> dict[str, Any]:
    return copy.deepcopy(tuning.load(tuning.FOLDER / f"{arch}.json"))


# ---------------------------------------------------------------------------------------------
# Content of tables
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
# The entry that serves
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
# Choosing, without a clock
# ---------------------------------------------------------------------------------------------
class FakeBench:
    """Stand-in for `measure.Bench`: seconds by configuration; some are wrong or refused."""

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
    # Entries that were not measured stay, and say so.
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
