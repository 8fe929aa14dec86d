"""`python -m bench compare A B`: is the operator slower or larger in B than in A?

For every case of both files: the ratio of the times, new over old, with the interval that the
spread of both runs allows. A regression is a ratio whose whole interval lies beyond the tolerance,
a result that is wrong or fails now, or memory that grew. Exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import results
from ..compared.candidates import OURS
from . import tables

TOLERANCE = 0.03
#: What the memory of a process differs by from run to run.
MEMORY_NOISE = 4 * 2**20


@dataclass(frozen=True)
class Row:
    """One case: `ratio` new over old with the interval (low, high), and what is to be said."""

    case: str
    old: float | None
    new: float | None
    ratio: float | None
    low: float | None
    high: float | None
    verdict: str

    @property
    def regressed(self) -> bool:
        return self.verdict.startswith(("SLOWER", "WRONG", "FAILED", "LARGER"))


def _ratio(old: dict[str, float], new: dict[str, float]) -> tuple[float, float, float]:
    """Of the medians, and between the extremes of the 20th and 80th percentiles."""
    return new["median"] / old["median"], new["p20"] / old["p80"], new["p80"] / old["p20"]


def _figures(case: dict[str, Any], by: str) -> dict[str, float] | None:
    """Seconds of ours; or, by a rival, what ours takes of the rival's time in the same rounds."""
    times = case.get("times", {})
    if by == OURS:
        figures: dict[str, float] | None = times.get(OURS, {}).get("seconds")
        return figures
    rival = times.get(by, {}).get("times_ours")
    if not rival:
        return None
    return {"median": 1 / rival["median"], "p20": 1 / rival["p80"], "p80": 1 / rival["p20"]}


def compare_case(
    old: dict[str, Any], new: dict[str, Any] | None, by: str, tolerance: float
) -> Row | None:
    """None where the old file has nothing to compare with."""
    name = f"{old['shape']} {old['dtype']}"
    before = _figures(old, by)
    if "wrong" in old or before is None:
        return None
    if new is None or "skipped" in new:
        reason = "not in the second file" if new is None else f"skipped: {new['skipped']}"
        return Row(name, before["median"], None, None, None, None, reason)
    if "wrong" in new:
        return Row(name, before["median"], None, None, None, None, f"WRONG: {new['wrong']}")
    after = _figures(new, by)
    if after is None:
        return Row(name, before["median"], None, None, None, None, f"FAILED: no time of {by}")
    ratio, low, high = _ratio(before, after)
    verdict = "same to the noise"
    if low > 1 + tolerance:
        verdict = "SLOWER"
    elif high < 1 - tolerance:
        verdict = "faster"
    sizes = [case.get("extra_bytes", {}).get(OURS) for case in (old, new)]
    if all(isinstance(size, int) for size in sizes):
        grown = sizes[1] - sizes[0]
        if grown > max(MEMORY_NOISE, tolerance * sizes[0]) and verdict != "SLOWER":
            verdict = f"LARGER by {grown / 2**20:.1f} MiB"
    return Row(name, before["median"], after["median"], ratio, low, high, verdict)


def compare(
    old: dict[str, Any], new: dict[str, Any], by: str = OURS, tolerance: float = TOLERANCE
) -> list[Row]:
    """A row for every case of `old` that has a time.

    Raises:
        ValueError: nothing to compare.
    """
    parts = [results.micro(result) for result in (old, new)]
    if parts[0] is None or parts[1] is None:
        raise ValueError("a file holds no case of the microbenchmark")
    found = {results.case_key(case): case for case in parts[1]["cases"]}
    if not found.keys() & {results.case_key(case) for case in parts[0]["cases"]}:
        raise ValueError("the files have no case in common")
    rows = [
        compare_case(case, found.get(results.case_key(case)), by, tolerance)
        for case in parts[0]["cases"]
    ]
    rows = [row for row in rows if row is not None]
    if not rows:
        raise ValueError(f"no case of the first file has a time by {by!r}")
    return [row for row in rows if row is not None]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What speaks against comparing the times themselves."""
    said = []
    for name in ("cpu", "threads", "gpu", "device"):
        pair = [
            result.get(name, {}) if name != "gpu" else (result.get("gpu") or {}).get("name")
            for result in (old, new)
        ]
        if pair[0] != pair[1]:
            said.append(f"{name}: {pair[0]} and {pair[1]}")
    return said


def text(rows: Sequence[Row], by: str) -> str:
    def figure(value: float | None) -> str:
        if value is None:
            return "-"
        return tables.time_text(value) if by == OURS else f"{value:.3f}"

    header = ("case", "old", "new", "new / old", "interval", "")
    lines = [header]
    for row in rows:
        interval = "-" if row.low is None else f"{row.low:.3f} - {row.high:.3f}"
        ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
        lines.append((row.case, figure(row.old), figure(row.new), ratio, interval, row.verdict))
    return "\n".join(tables.aligned(lines))


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench compare") -> int:
    """0 no regression, 1 a regression, 2 for bad input."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("old", type=Path, metavar="A", help="result file to compare with")
    parser.add_argument("new", type=Path, metavar="B", help="result file that is judged")
    parser.add_argument(
        "--by",
        choices=("time", "matmul", "authors"),
        default="time",
        help="compare the time of the operator, or its share of a rival's time in the same run, "
        "which also holds between machines that are not equally busy; default: time",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help=f"relative change that is never a regression; default {TOLERANCE}",
    )
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.tolerance < 10:
        parser.error(f"--tolerance must be 0 or more, got {arguments.tolerance}")
    by = OURS if arguments.by == "time" else arguments.by
    try:
        old, new = results.load(arguments.old), results.load(arguments.new)
        rows = compare(old, new, by, arguments.tolerance)
    except (OSError, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    others = differences(old, new)
    if others and by == OURS:
        print("Measured on different machines (" + "; ".join(others) + "): use --by matmul.\n")
    print(text(rows, by))
    regressed = [row for row in rows if row.regressed]
    print(f"\n{len(regressed)} of {len(rows)} cases regressed")
    return int(bool(regressed))
