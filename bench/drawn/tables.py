"""Text of results, from the same dictionaries that a result's JSON file holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..compared.candidates import CANDIDATES

COLUMNS = (
    "candidate",
    "time",
    "p20 - p80",
    "time / ours",
    "rate",
    "of matmul",
    "of copy",
    "peak extra memory",
)
METHODS = ("without", "ours", "authors")
"""Ways to run a model end to end."""


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text, every column as wide as its widest cell; all rows have equally many cells."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def time_text(seconds: float) -> str:
    """Three significant digits in the unit that fits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def signed_time(seconds: float) -> str:
    """`time_text` with a sign."""
    return ("-" if seconds < 0 else "+") + time_text(abs(seconds))


def interval_text(share: dict[str, float]) -> str:
    """A share with its interval, in percent."""
    return f"{share['median']:+.2%} [{share['low']:+.2%}, {share['high']:+.2%}]"


def memory_text(extra: Any) -> str:
    """MiB; "failed" for a candidate that did not run, "-" if nothing was measured."""
    if isinstance(extra, int):
        return f"{extra / 2**20:.1f} MiB"
    return "failed" if isinstance(extra, dict) else "-"


def rate_text(tflops: float) -> str:
    """A rate in the unit that fits a GPU or a CPU."""
    return f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{tflops * 1e3:.3g} GFLOP/s"


def rate_cells(taken: dict[str, Any]) -> list[str]:
    """Rate of a candidate, and its shares of the two ceilings."""
    if "tflops" not in taken:
        return ["-"] * 3
    return [rate_text(taken["tflops"]), f"{taken['of_matmul']:.0%}", f"{taken['of_copy']:.0%}"]


def machine_line(result: dict[str, Any]) -> str:
    """The machine and the versions that a result comes from."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    machine = f"{result['cpu']}, {result['threads']} threads"
    gpu = result["gpu"]
    if gpu:
        machine = f"{gpu['name']}, driver {gpu['driver']}"
    return f"{machine}; {versions}"


def ceilings_line(limits: dict[str, Any]) -> str:
    """The ceilings that `timing.ceilings.measure` found."""
    return (
        f"Ceilings in this run: {rate_text(limits['matmul_tflops'])} "
        f"({limits['dtype']} product of {limits['matmul_side']} x {limits['matmul_side']}), "
        f"{limits['copy_bytes_per_second'] / 1e9:.3g} GB/s (copy, read + write)"
    )


def checked_text(case: dict[str, Any]) -> str:
    """The outcome of the check against fp64."""
    correct = case["correct"]
    return f"{correct['checked']} tokens right, {correct['pushed_share']:.0%} pushed"


def candidate_rows(case: dict[str, Any], reasons: bool = False) -> list[tuple[str, list[str]]]:
    """(name, cells of COLUMNS) of each candidate of a measured case.

    With `reasons`, a candidate that did not run has the reason in place of its time.
    """
    times, extra = case.get("times", {}), case.get("extra_bytes", {})
    rows = []
    for name in [name for name in CANDIDATES if name in times or name in extra]:
        taken = times.get(name, {})
        cells = ["-"] * 6
        if "failed" in taken:
            cells[0] = f"did not run: {taken['failed'][:60]}" if reasons else "failed"
        elif taken:
            seconds = taken["seconds"]
            cells = [
                time_text(seconds["median"]),
                f"{time_text(seconds['p20'])} - {time_text(seconds['p80'])}",
                f"{taken['times_ours']['median']:.2f}",
                *rate_cells(taken),
            ]
        rows.append((name, [CANDIDATES[name].label, *cells, memory_text(extra.get(name))]))
    return rows


def case_lines(case: dict[str, Any]) -> list[str]:
    """One shape: a heading, then a row for each candidate."""
    work = 2 * case["multiply_adds"] / 1e9
    heading = f"{case['name']}: {case['shape']} {case['dtype']}, {work:.3g} GFLOP of matching"
    if "skipped" in case:
        return [heading, f"  skipped: {case['skipped']}", ""]
    if "wrong" in case:
        return [heading, f"  WRONG, no times: {case['wrong']}", ""]
    lines = [f"{heading}; {checked_text(case)}"]
    lines += aligned([COLUMNS, *(cells for _, cells in candidate_rows(case))])
    times = case.get("times", {})
    lines += [f"  {name}: {t['failed']}" for name, t in times.items() if "failed" in t]
    return [*lines, ""]


def method_rows(model: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(method, cells) of a model that was measured end to end.

    Cells: method, time of a step, time added to it, its share, time added to an image, its share.
    """
    rows = []
    for method in [method for method in METHODS if method in model["step"]]:
        step, run = model["step"][method], model["run"].get(method, {})
        cells = [method, time_text(step["seconds"]["median"])]
        for part, images in ((step, 1), (run, model["images"])):
            if "added_seconds" in part:
                cells.append(signed_time(part["added_seconds"]["median"] / images))
                cells.append(interval_text(part["added_share"]))
            else:
                cells += ["-", "-"]
        rows.append((method, cells))
    return rows
