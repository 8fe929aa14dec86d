"""The GPU suite's stage of tests: outcomes as they come, workers that lose the device."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from bench._path import ROOT
from bench.gpu import full, processes, suite
from bench.gpu.processes import Log, SuiteRun


def test_a_test_run_cut_short_leaves_its_outcomes(tmp_path: Path) -> None:
    lines = [
        {"test": "a", "outcome": "passed", "why": ""},
        {"test": "b", "outcome": "failed", "why": "AssertionError"},
    ]
    path = tmp_path / "outcomes.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"test": "c", "outc')
    counted = full.read_outcomes(path)
    assert (counted["passed"], counted["failed"], counted["skipped"]) == (1, 1, 0)
    assert counted["failures"] == {"b": "AssertionError"}
    assert full.read_outcomes(tmp_path / "none")["passed"] == 0


def test_a_test_that_failed_keeps_its_reason(tmp_path: Path) -> None:
    # A worker that dies after a device fault is reported once more by pytest-xdist.
    path = tmp_path / "outcomes.jsonl"
    lines = [{"test": "a", "outcome": "failed", "why": why} for why in ("fault", "worker crashed")]
    lines.append({"test": "a", "outcome": "passed", "why": ""})
    path.write_text("\n".join(map(json.dumps, lines)))
    counted = full.read_outcomes(path)
    assert (counted["passed"], counted["failed"]) == (0, 1)
    assert counted["failures"] == {"a": "fault"}


@pytest.mark.parametrize("parallel", [True, False])
def test_every_test_runs_once_and_of_the_kernels_alone(
    parallel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = tmp_path / "tests"
    program = "import os, pytest\nBACKENDS = os.environ['NEGTOME_FAST_TEST_BACKENDS'].split(',')\n"
    program += "@pytest.mark.parametrize('b', BACKENDS)\ndef test_a(b): assert b == 'triton'\n"
    for name in ("operator/test_operator.py", "integrations/test_compat.py"):
        (tests / name).parent.mkdir(parents=True)
        (tests / name).write_text(program)
    if parallel:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for module in (full, processes):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(full, "MOST_WORKERS", 1)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "work").mkdir()
    run = SuiteRun(tmp_path, tmp_path / "work", False, Log(tmp_path / "suite.log"))
    found = full.run_tests(run, 250.0)
    assert (found["passed"], found["failed"], found["cut_short"]) == (2, 0, False)
    names = {"kernels", "others"} if parallel else {"test_operator", "test_compat"}
    assert found["exit_codes"] == dict.fromkeys(names, 0)
    assert not suite.tests_failed(found)


def test_a_worker_that_loses_the_device_ends_and_another_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    program = """
import pytest
from bench.gpu import pytest_outcomes
@pytest.mark.parametrize("n", range(4))
def test_a(n, monkeypatch):
    if n == 0:
        pytest_outcomes.device_lost = lambda: True  # as after an illegal memory access
        raise RuntimeError("CUDA error")
"""
    (tmp_path / "test_some.py").write_text(program)
    outcomes = tmp_path / "outcomes.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.pytest_outcomes", "-n", "1"]
    command += ["--max-worker-restart", "3", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(tmp_path), str(tmp_path)]
    environment = {"NEGTOME_FAST_OUTCOMES": str(outcomes)}
    assert processes.run_limited(command, tmp_path / "log", 300.0, environment) == 1
    counted = full.read_outcomes(outcomes)
    assert (counted["passed"], counted["failed"]) == (3, 1), (tmp_path / "log").read_text()
    (why,) = counted["failures"].values()
    assert "raise RuntimeError" in why


def test_outcomes_are_written_as_they_come(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    outcomes = tmp_path / "outcomes.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.pytest_outcomes"]
    command += ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    environment = {"NEGTOME_FAST_OUTCOMES": str(outcomes)}
    assert processes.run_limited(command, tmp_path / "log", 120.0, environment) == 1
    counted = full.read_outcomes(outcomes)
    assert (counted["passed"], counted["failed"]) == (1, 1)
