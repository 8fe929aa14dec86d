"""`python -m bench loaded`: busy processes end, shapes are merged, and targets are judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.suites import loaded


def children() -> set[str]:
    threads = Path("/proc/self/task").iterdir()
    return {pid for thread in threads for pid in (thread / "children").read_text().split()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children cannot be listed")
def test_busy_processes_are_busy_and_end() -> None:
    before = children()
    with pytest.raises(KeyError), loaded.busy_processes(2):
        started = children() - before
        raise KeyError
    assert len(started) == 2
    assert children() == before


def test_busy_processes_end_by_themselves() -> None:
    with loaded.busy_processes(1, seconds=0.1):
        pass


def case(one_thread: float, authors: float) -> dict:
    over = {"ours": 1.0, "ours, 1 thread": one_thread, "authors": authors, "matmul": 1.0}
    return {"loaded": {name: {"times_ours": {"median": ratio}} for name, ratio in over.items()}}


def test_targets() -> None:
    assert loaded.missed(case(1 / 1.5, 2.0)) == []
    assert loaded.missed(case(1 / 1.6, 2.0)) == ["1.60 times the time of one thread"]
    assert loaded.missed(case(1.0, 1.9)) == ["authors' / ours 1.90"]


def test_measures_and_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "TARGETS", {"ours, 1 thread": 1e9, "authors": 0.0})
    out, threads = tmp_path / "loaded.json", torch.get_num_threads()
    words = ["loaded", "--seconds", "0.01", "--busy", "1", "--threads", "1", "--out", str(out)]
    try:
        for shape in ("2x64x32", "2x65x32", "2x64x32"):
            assert main([*words, "--shape", shape]) == 0
    finally:
        torch.set_num_threads(threads)
    record = json.loads(out.read_text())
    assert [entry["shape"] for entry in record["loaded"]] == ["2x64x32", "2x65x32"]
    assert record["busy_processes"] == 1 and record["commit"] is not None
    for state in ("idle", "loaded"):
        entries = record["loaded"][0][state]
        assert set(entries) == set(loaded.CONTESTANTS)
        assert all(entry["seconds"]["samples"] >= loaded.MIN_ROUNDS for entry in entries.values())
