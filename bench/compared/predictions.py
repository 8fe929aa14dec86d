"""Predictions from before the first measurement: our time over the bare matmul's, by shape.

The ranges are in `predictions.json`, and bench/NOTES.md shows them with the reasons; `python -m
bench.compared.predictions` prints the table of that page.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("predictions.json")
HEADER = "| shape, bf16 | predicted, ours / bare matmul | what limits it |"


def load() -> list[dict[str, Any]]:
    """The predictions, most important shape first: shape, dtype, low, high, limit."""
    found: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def table() -> str:
    """All predictions as a Markdown table."""
    rows = [f"| {p['shape']} | {p['low']:g} to {p['high']:g} | {p['limit']} |" for p in load()]
    return "\n".join([HEADER, "|---|---|---|", *rows])


def ratio(case: dict[str, Any]) -> float | None:
    """Our time over the bare matmul's, from the paired rounds of one case."""
    paired = case.get("times", {}).get("matmul", {}).get("times_ours")
    return None if not paired else 1 / float(paired["median"])


def beside(case: dict[str, Any]) -> dict[str, Any] | None:
    """The prediction for a case, with the measured ratio and a verdict; None if there is none."""
    for one in load():
        if (one["shape"], one["dtype"]) == (case.get("shape"), case.get("dtype")):
            break
    else:
        return None
    measured = ratio(case)
    verdict = "not measured"
    if measured is not None:
        verdict = "as predicted"
        if measured > one["high"]:
            verdict = "slower than predicted"
        elif measured < one["low"]:
            verdict = "faster than predicted"
    return {**one, "measured": measured, "verdict": verdict}


if __name__ == "__main__":
    print(table())
