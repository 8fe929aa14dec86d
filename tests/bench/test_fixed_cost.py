"""The benchmark of the fixed cost: what takes turns, and the file that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.suites import fixed_cost


@pytest.mark.parametrize("mode", fixed_cost.MODES)
def test_only_the_first_reference_has_a_rival(mode: str) -> None:
    case = fixed_cost.measure((4, 8, 16), "fp32", mode, threads=1, seconds=0.0)
    assert ("of_authors" in case) == ("authors" in case["seconds"]) == (mode in RIVALLED)
    assert all(taken["samples"] == 6 for taken in case["seconds"].values())


RIVALLED = ("first", "first, 2 groups")


def test_cases_of_earlier_runs_stay_and_those_measured_again_do_not(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    common = ["--shapes", "2x8x16", "--dtypes", "fp32", "--threads", "1", "--seconds", "0"]
    threads = torch.get_num_threads()
    for mode in ("first", "others", "first"):
        assert fixed_cost.main([*common, "--modes", mode, "--add", "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads
    record = json.loads(out.read_text(encoding="utf-8"))
    assert [case["mode"] for case in record["fixed_cost"]] == ["first", "others"]
    assert record["cpu"] and record["versions"]
