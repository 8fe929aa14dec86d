"""What a run prints, from the same dictionaries that its JSON file holds."""

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


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as lines, every column as wide as its widest cell."""
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
    return ("-" if seconds < 0 else "+") + time_text(abs(seconds))


def interval_text(share: dict[str, float]) -> str:
    """A share with its interval, in percent."""
    return f"{share['median']:+.2%} [{share['low']:+.2%}, {share['high']:+.2%}]"


def memory_text(extra: Any) -> str:
    if isinstance(extra, int):
        return f"{extra / 2**20:.1f} MiB"
    return "failed" if isinstance(extra, dict) else "-"


def rate_text(tflops: float) -> str:
    """In the unit that fits a GPU or a CPU."""
    return f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{tflops * 1e3:.3g} GFLOP/s"


def rate_cells(taken: dict[str, Any]) -> list[str]:
    """Rate, and shares of the two ceilings, of one candidate's times."""
    if "tflops" not in taken:
        return ["-"] * 3
    return [rate_text(taken["tflops"]), f"{taken['of_matmul']:.0%}", f"{taken['of_copy']:.0%}"]


def machine_line(result: dict[str, Any]) -> str:
    """Where the numbers come from."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    cpu = f"{result['cpu']}, {result['threads']} threads"
    gpu = result["gpu"]
    if gpu:
        cpu = f"{gpu['name']}, driver {gpu['driver']}"
    return f"{cpu}; {versions}"


def ceilings_line(limits: dict[str, Any]) -> str:
    return (
        f"Ceilings in this run: {rate_text(limits['matmul_tflops'])} "
        f"({limits['dtype']} product of {limits['matmul_side']} x {limits['matmul_side']}), "
        f"{limits['copy_bytes_per_second'] / 1e9:.3g} GB/s (copy, read + write)"
    )


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
    rows: list[tuple[str, ...]] = [COLUMNS]
    for name in [name for name in CANDIDATES if name in times or name in extra]:
        taken = times.get(name, {})
        cells = ["-"] * 6
        if "failed" in taken:
            cells[0] = "failed"
        elif taken:
            seconds, ratio = taken["seconds"], taken["times_ours"]
            cells = [
                time_text(seconds["median"]),
                f"{time_text(seconds['p20'])} - {time_text(seconds['p80'])}",
                f"{ratio['median']:.2f}",
                *rate_cells(taken),
            ]
        rows.append((CANDIDATES[name].label, *cells, memory_text(extra.get(name))))
    lines = [heading, *aligned(rows)]
    lines += [f"  {name}: {t['failed']}" for name, t in times.items() if "failed" in t]
    return [*lines, ""]
