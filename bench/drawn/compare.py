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
MEMORY_NOISE = 4 * 2**20
"""Bytes by which the memory of a process varies from run to run."""


@dataclass(frozen=True)
class ComparedCase:
    """One case of two results.

    Attributes:
        case: shape and dtype.
        old, new: seconds, or the share of a rival's time.
        ratio, low, high: new over old, with its interval.
        verdict: a word for the table; capitals mark a regression.
    """

    case: str
    old: float
    verdict: str
    new: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def regressed(self) -> bool:
        return self.verdict.startswith(("SLOWER", "WRONG", "FAILED", "LARGER"))


def _figures(case: dict[str, Any], by: str) -> dict[str, float] | None:
    """Seconds of ours; with a rival, the share that ours takes of its time in the same rounds."""
    times = case.get("times", {})
    if by == OURS:
        figures: dict[str, float] | None = times.get(OURS, {}).get("seconds")
        return figures
    rival = times.get(by, {}).get("times_ours")
    if not rival:
        return None
    return {"median": 1 / rival["median"], "p20": 1 / rival["p80"], "p80": 1 / rival["p20"]}


def _grown(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> str | None:
    """Verdict on the extra memory, or None if it did not grow."""
    before, after = (case.get("extra_bytes", {}).get(OURS) for case in (old, new))
    if isinstance(before, int) and isinstance(after, int):
        grown = after - before
        if grown > max(MEMORY_NOISE, tolerance * before):
            return f"LARGER by {grown / 2**20:.1f} MiB"
    return None


def compare_case(
    old: dict[str, Any], new: dict[str, Any] | None, by: str, tolerance: float
) -> ComparedCase | None:
    """Compare one case; None if the old file has no time to compare with."""
    name = f"{old['shape']} {old['dtype']}"
    before = _figures(old, by)
    if "wrong" in old or before is None:
        return None
    if new is None:
        return ComparedCase(name, before["median"], "not in the second file")
    if "skipped" in new:
        return ComparedCase(name, before["median"], f"skipped: {new['skipped']}")
    if "wrong" in new:
        return ComparedCase(name, before["median"], f"WRONG: {new['wrong']}")
    after = _figures(new, by)
    if after is None:
        return ComparedCase(name, before["median"], f"FAILED: no time of {by}")
    ratio = after["median"] / before["median"]
    low, high = after["p20"] / before["p80"], after["p80"] / before["p20"]
    if low > 1 + tolerance:
        verdict = "SLOWER"
    else:
        faster = "faster" if high < 1 - tolerance else "same to the noise"
        verdict = _grown(old, new, tolerance) or faster
    return ComparedCase(name, before["median"], verdict, after["median"], ratio, low, high)


def compare(
    old: dict[str, Any], new: dict[str, Any], by: str = OURS, tolerance: float = TOLERANCE
) -> list[ComparedCase]:
    """Compare every case of `old` that has a time.

    Raises:
        ValueError: there is nothing to compare.
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
    compared = [row for row in rows if row is not None]
    if not compared:
        raise ValueError(f"no case of the first file has a time by {by!r}")
    return compared


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences of the machines, which make times of the two results incomparable."""

    def value(result: dict[str, Any], name: str) -> Any:
        return (result.get("gpu") or {}).get("name") if name == "gpu" else result.get(name)

    names = ("cpu", "threads", "gpu", "device")
    pairs = {name: (value(old, name), value(new, name)) for name in names}
    return [f"{name}: {a} and {b}" for name, (a, b) in pairs.items() if a != b]


def text(rows: Sequence[ComparedCase], by: str) -> str:
    """The comparison as a table."""

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
    """Return 0 without a regression, 1 with one, 2 for bad input."""
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
