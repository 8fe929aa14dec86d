"""The table that a run prints, from the same dictionaries that its JSON file holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .candidates import CANDIDATES

COLUMNS = ("candidate", "time", "p20 - p80", "time / ours", "ours / time", "peak extra memory")
WIDTHS = (26, 10, 19, 12, 12, 17)


def _line(cells: Iterable[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def time_text(seconds: float) -> str:
    """Three significant digits in the unit that fits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def memory_text(extra: Any) -> str:
    if isinstance(extra, int):
        return f"{extra / 2**20:.1f} MiB"
    return "failed" if isinstance(extra, dict) else "-"


def machine_line(result: dict[str, Any]) -> str:
    """Where the numbers come from."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    cpu = f"{result['cpu']}, {result['threads']} threads"
    return f"{result['gpu']['name'] if result['gpu'] else cpu}; {versions}"


def case_lines(case: dict[str, Any]) -> list[str]:
    """One shape: a heading, then a row for each candidate."""
    work = 2 * case["multiply_adds"] / 1e9
    heading = f"{case['name']}: {case['shape']} {case['dtype']}, {work:.3g} GFLOP of matching"
    if "skipped" in case:
        return [heading, f"  skipped: {case['skipped']}", ""]
    if "wrong" in case:
        return [heading, f"  WRONG, no times: {case['wrong']}", ""]
    correct = case["correct"]
    heading += f"; {correct['checked']} tokens right, {correct['pushed_share']:.0%} pushed"
    times, extra = case.get("times", {}), case.get("extra_bytes", {})
    lines = [heading, _line(COLUMNS)]
    for name in [name for name in CANDIDATES if name in times or name in extra]:
        taken = times.get(name, {})
        cells = ["-"] * 4
        if "failed" in taken:
            cells[0] = "failed"
        elif taken:
            seconds, ratio = taken["seconds"], taken["times_ours"]
            cells = [
                time_text(seconds["median"]),
                f"{time_text(seconds['p20'])} - {time_text(seconds['p80'])}",
                f"{ratio['median']:.2f}",
                f"{1 / ratio['median']:.2f}",
            ]
        lines.append(_line([CANDIDATES[name].label, *cells, memory_text(extra.get(name))]))
    lines += [f"  {name}: {t['failed']}" for name, t in times.items() if "failed" in t]
    return [*lines, ""]
