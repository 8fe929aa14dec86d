"""Lists of configurations that compile well: their content, their validity, and their use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from negtome_fast.backends import triton_runtime as runtime
from negtome_fast.kernels import tuning
from negtome_fast.kernels.tuning import Config, Problem
from negtome_fast.tuner import candidates, compile_report, launches, run, space, tables

FLUX = Problem("bfloat16", 3, 4096, 4096, 3072)
COMMAND = "make candidates"


def row_of(key: candidates.Key, triton: str, **found: Any) -> dict[str, Any]:
    """A row of the compile report without a compiler: good, except for the fields `found`."""
    kernel, dtype, config = key
    row = {"triton": triton, "target": "sm_90", "kernel": kernel, "dtype": dtype}
    row |= {"config": list(config), "variant": "paper", "error": None, "spills": 0, "shared": 0}
    row |= {
        "shared_limit": 232448,
        "narrow_offsets": 0,
        "nan_maxima": 0,
        "registers": 100,
        "programs": 2,
    }
    return row | {"matrix_instructions": 4, "occupancy": 0.25} | found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the lists, empty."""
    monkeypatch.setattr(candidates, "FOLDER", tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------
def test_a_list_keeps_what_each_triton_made(folder: Path) -> None:
    key = ("tiles", "bfloat16", Config(64, 64, 64, 4, 3))
    other = ("push_from_keys", "bfloat16", Config(8, 0, 256, 4, 1))
    reports = {
        "3.7.1": {key: row_of(key, "3.7.1", spills=8), other: row_of(other, "3.7.1")},
        "3.6.0": {key: row_of(key, "3.6.0"), other: row_of(other, "3.6.0", registers=40)},
    }
    path = folder / "sm_90.json"
    path.write_text(candidates.text_of("sm_90", [6], reports))
    for version, rows in reports.items():
        found = candidates.listed("sm_90", version)
        assert list(found) == list(rows)
        for one, row in found.items():
            assert {name: row[name] for name in candidates.FOUND} == {
                name: rows[one][name] for name in candidates.FOUND
            }
            assert compile_report.cells(row) and row["triton"] == version
    assert candidates.listed("sm_90", "3.5.0") == {} == candidates.listed("sm_80", "3.7.1")
    # A list does not serve other kernels or other fields.
    for field, value in (("sources", "0" * 16), ("fields", ["BLOCK_M"]), ("schema", 0)):
        table = json.loads(candidates.text_of("sm_90", [6], reports)) | {field: value}
        path.write_text(json.dumps(table))
        assert candidates.listed("sm_90", "3.7.1") == {}
    told = candidates.summary(reports)
    assert "| kernel | dtype | compiled | good by 3.7.1 | good by 3.6.0 |" in told
    only = "64x64x64, 4 warps, 3 stages (3.7.1: spills 8)"
    assert f"| tiles | bfloat16 | 1 | 0 | 1 | 0 | {only} |" in told
    assert "| push_from_keys | bfloat16 | 1 | 1 | 1 | 1 | none |" in told


def test_the_fingerprint_is_of_what_is_compiled() -> None:
    text = '"""What it does."""\n\n\ndef f(x):\n    """Adds."""\n    return x + "a"\n'
    same = 'def f(x):  # a comment\n\n    return x  +  "a"\n'
    assert candidates.fingerprint([text]) == candidates.fingerprint([same])
    for other in (text.replace("+", "-"), text.replace('"a"', '"b"')):
        assert candidates.fingerprint([text]) != candidates.fingerprint([other])
    assert len(candidates.sources()) == 16


# ---------------------------------------------------------------------------------------------
# Shipped lists
# ---------------------------------------------------------------------------------------------
SHIPPED = sorted({"sm_90", *(path.stem for path in candidates.FOLDER.glob("*.json"))})


def shipped(arch: str) -> tuple[list[int], dict[str, candidates.Rows]]:
    """Numbers of configurations of a kernel that a list was made for, and its rows by compiler."""
    path = candidates.FOLDER / f"{arch}.json"
    assert path.is_file(), f"no list for {arch}; run {COMMAND}"
    table = json.loads(path.read_text(encoding="utf-8"))
    versions = {v for entry in table["candidates"] for v in entry if re.fullmatch(r"[\d.]+", v)}
    found = {version: candidates.listed(arch, version) for version in sorted(versions)[::-1]}
    return table["kept"], found


@pytest.mark.parametrize("arch", SHIPPED)
def test_shipped_lists_know_all_that_the_tuner_would_ask(arch: str) -> None:
    kept, reports = shipped(arch)
    assert candidates.QUICK in kept and "3.6.0" in reports  # the GPU suite's compiler
    for version, rows in reports.items():
        assert rows, f"the kernels have changed since the list was made; run {COMMAND}"

        def refuse(keys: Sequence[candidates.Key], version: str = version) -> Any:
            pytest.fail(f"{arch}, Triton {version}: {keys} are not listed; run {COMMAND}")

        for dtype in {dtype for _, dtype, _ in rows}:
            candidates.met(arch, dtype, kept, dict(rows), refuse)


@pytest.mark.parametrize("arch", SHIPPED)
def test_a_sample_of_a_list_compiles_to_what_it_says(arch: str) -> None:
    rows = candidates.listed(arch, triton.__version__)
    if not rows:
        pytest.skip(f"nothing is listed for {arch} and Triton {triton.__version__}")
    # One of each kernel, another one whenever the list changes.
    keys = list(rows)
    number = int(candidates.sources(), 16)
    groups = [[key for key in keys if key[0] == kernel] for kernel in tuning.TUNED]
    sample = [group[number % len(group)] for group in groups if group]
    for found, key in zip(compile_report.report_configurations(arch, sample), sample, strict=True):
        assert {name: found[name] for name in candidates.FOUND} == {
            name: rows[key][name] for name in candidates.FOUND
        }, f"{key}; run {COMMAND}"


# ---------------------------------------------------------------------------------------------
# On a GPU, by stubs
# ---------------------------------------------------------------------------------------------
class Compiler:
    """Stand-in for `launches.compile_all`: some configurations spill; `rounds` keeps the calls."""

    def __init__(self, spilling: Any) -> None:
        self.spilling, self.rounds = spilling, []

    def __call__(self, arch: str, jobs: Sequence[Any]) -> list[dict[str, Any]]:
        keys = [key for key, _ in jobs]
        self.rounds.append(keys)
        return [row_of(key, "0", spills=8 * self.spilling(key[2])) for key in keys]


SHAPES = (space.TokenShape(4, 4096, 3072), space.TokenShape(8, 1024, 1280, 2))


def grouped_by_16(config: Config) -> bool:
    return config.GROUP_M == 16


def prepared(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> run.Candidates:
    monkeypatch.setattr(launches, "compile_all", compiler)
    found = run.Candidates("sm_90", "sm_90", 132, 6)
    found.prepare(SHAPES, "bfloat16", lambda shape, reference: None)
    return found


def test_without_a_list_what_spills_makes_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(grouped_by_16)
    found = prepared(compiler, monkeypatch)
    asked = [key for keys in compiler.rounds for key in keys]
    assert 1 < len(compiler.rounds) <= run.ROUNDS
    assert len(asked) == len(set(asked))  # each of them once
    for shape in SHAPES:
        measured = found("tiles", shape.problem("bfloat16"))
        assert len(measured) >= 6 and not any(map(grouped_by_16, measured))
        # All of them were compiled before anything is measured.
        assert {("tiles", "bfloat16", config) for config in measured} <= set(asked)


def test_with_a_list_nothing_is_compiled_that_is_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: candidates.Rows = {}

    def compiled(keys: Sequence[candidates.Key]) -> list[dict[str, Any]]:
        return [row_of(key, triton.__version__, spills=8 * grouped_by_16(key[2])) for key in keys]

    candidates.met("sm_90", "bfloat16", [6], rows, compiled)
    path = folder / "sm_90.json"
    path.write_text(candidates.text_of("sm_90", [6], {triton.__version__: rows}))
    compiler = Compiler(grouped_by_16)
    found = prepared(compiler, monkeypatch)
    assert found.known == len(rows)
    assert len(compiler.rounds) == 1
    own = {found.own(k, s.problem("bfloat16", k == "pairs")) for s in SHAPES for k in tuning.TUNED}
    assert not any(grouped_by_16(config) for *_, config in set(compiler.rounds[0]) - own)
    assert found("tiles", FLUX)[0] == tuning.plan("sm_90", *FLUX).tiles


class Bench:
    """Stand-in for timing on a GPU: 3 stages are fastest, and with overlap faster still."""

    def __init__(self, shape: Any, dtype: str, device: torch.device, reference: str) -> None:
        self.problem = shape.problem(dtype, others=reference == "others")

    def wrong(self) -> None:
        return None

    def seconds(self) -> float:
        tiles = tuning.plan("sm_90", *self.problem).tiles
        return 1e-6 * (3 + abs(tiles.num_stages - 3) - 0.5 * tiles.OVERLAP)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(runtime, "available", lambda device: (True, "pretended"))
    monkeypatch.setattr(runtime, "interpreting", lambda: False)
    monkeypatch.setattr(runtime, "architecture", lambda index: "sm_90")
    monkeypatch.setattr(runtime, "multiprocessors", lambda index: 132)
    monkeypatch.setattr(run, "Bench", Bench)
    monkeypatch.setattr(tables, "machine", lambda device: {"device": "pretended"})
    yield
    tuning.forget()


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_compiles_first_and_then_measures(
    fails: bool, device: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(grouped_by_16)

    def refuse(*_: Any) -> Any:
        raise AttributeError("no such hook")

    monkeypatch.setattr(launches, "compile_all", refuse if fails else compiler)
    told: list[str] = []
    out = tmp_path / "own" / "sm_90.json"
    assert run.run(SHAPES[:1], "bfloat16", True, out, None, told.append) == out
    entry = tuning.load(out)["entries"][0]
    assert entry["measured"] and Problem(*(entry[n] for n in Problem._fields)) == FLUX
    tiles = Config(*entry["tiles"])
    assert tiles.num_stages == 3 and tiles.OVERLAP == 1 and entry["microseconds"]["tiles"] == 2.5
    assert entry["machine"] == {"device": "pretended"}
    text = "\n".join(told)
    if fails:
        # Then every candidate is compiled where it is launched.
        assert "compiling in parallel failed, AttributeError: no such hook" in text
    else:
        compiled = sum(len(keys) for keys in compiler.rounds)
        assert f"{compiled} compiled in" in text
        assert text.index("compiled in") < text.index("tiles [")
