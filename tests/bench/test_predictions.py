"""The predictions: the notes show them, and the suite puts its measurements beside them."""

from __future__ import annotations

from typing import Any

import pytest

from bench._path import ROOT
from bench.compared import predictions
from bench.gpu import smoke, suite


def test_notes_show_the_predictions_that_the_suite_reads() -> None:
    notes = (ROOT / "bench" / "NOTES.md").read_text(encoding="utf-8")
    assert predictions.table() in notes
    assert [one["shape"] for one in predictions.load()] == list(smoke.SHAPES)


@pytest.mark.parametrize(
    ("place", "verdict"),
    [
        (0.5, "as predicted"),
        (1.1, "slower than predicted"),
        (-0.1, "faster than predicted"),
        (None, "not measured"),
    ],
)
def test_what_is_measured_stands_beside_what_was_predicted(
    place: float | None, verdict: str
) -> None:
    """`place` is where the measured ratio lies between the predicted ends, 0 and 1."""
    one = predictions.load()[0]
    ratio = None if place is None else one["low"] + place * (one["high"] - one["low"])
    case: dict[str, Any] = {"shape": one["shape"], "dtype": one["dtype"], "times": {}}
    if ratio:
        case["times"] = {"matmul": {"times_ours": {"median": 1 / ratio}}}
    beside = predictions.beside(case)
    assert beside is not None and beside["verdict"] == verdict
    assert beside["measured"] == (pytest.approx(ratio) if ratio else None)
    assert predictions.beside({"shape": "2x3x4", "dtype": "bfloat16"}) is None


def test_the_last_lines_hold_the_measured_and_the_predicted_ratio() -> None:
    one = predictions.load()[0]
    seconds = {"median": one["high"] * 1e-3}
    paired = {"seconds": {"median": 1e-3}, "times_ours": {"median": 1 / one["high"]}}
    case: dict[str, Any] = {"shape": one["shape"], "dtype": one["dtype"]}
    case["times"] = {"ours": {"seconds": seconds}, "matmul": paired}
    case["prediction"] = predictions.beside(case)
    (_, line) = suite.case_lines({"stages": {"times": {"result": {"cases": [case]}}}})
    low, high = one["low"], one["high"]
    cells = f"{one['shape']} bfloat16 {high:g} ms {high:.2f} {low:g} - {high:g} as predicted"
    assert line.split() == cells.split()
