"""Parts of pages from results of `python -m bench`: speed, growth, load, end to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.drawn.tables import (
    ceilings_line,
    interval_text,
    machine_line,
    memory_text,
    rate_cells,
    signed_time,
    time_text,
)
from bench.results import end_to_end as models_of
from bench.results import micro

from .markers import NOT_MEASURED, table


def _over_ours(times: dict[str, Any], candidate: str) -> str:
    taken = times.get(candidate)
    if not taken:
        return "-"
    return f"{taken['times_ours']['median']:.2f}" if "times_ours" in taken else "failed"


def _not_measured(cases: Sequence[dict[str, Any]]) -> str:
    """A sentence on the cases without times, with the reasons; empty if there are none."""
    reasons: dict[str, list[str]] = {}
    for case in cases:
        reason = f"wrong: {case['wrong']}" if "wrong" in case else case.get("skipped")
        if reason:
            reasons.setdefault(reason, []).append(f"{case['shape']} {case['dtype']}")
    if not reasons:
        return ""
    told = (f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    return f"\n\nNot measured: {'; '.join(told)}."


def _origin(record: dict[str, Any]) -> str:
    line = f"{machine_line(record)}; {record['date'][:10]}."
    if record.get("ceilings"):
        line += f" {ceilings_line(record['ceilings'])}."
    return line


def speed(record: dict[str, Any]) -> str:
    """The operator's benchmark, a row for each shape; ratios are medians of paired rounds."""
    found = micro(record)
    if found is None:
        return NOT_MEASURED
    record = found
    cases = [case for case in record["cases"] if case.get("series", "shapes") == "shapes"]
    rivals = ("authors", "authors-compiled", "split", "split-compiled", "matmul", "matmul-into")
    rows = []
    for case in cases:
        times, extra = case.get("times", {}), case.get("extra_bytes", {})
        if not times and not extra:
            continue
        ours = times.get("ours", {})
        rate, of_matmul, _ = rate_cells(ours)
        rows.append(
            [
                f"{case['shape']} {case['dtype']}",
                time_text(ours["seconds"]["median"]) if ours else "-",
                *(_over_ours(times, rival) for rival in rivals),
                rate if rate == "-" else f"{rate}, {of_matmul}",
                memory_text(extra.get("ours")),
                memory_text(extra.get("authors")),
            ]
        )
    header = (
        "B x N x D",
        "ours",
        "authors' / ours",
        "authors' compiled / ours",
        "split / ours",
        "split compiled / ours",
        "bare matmul / ours",
        "matmul, no allocation / ours",
        "rate, of the ceiling",
        "extra memory, ours",
        "authors'",
    )
    return table(header, rows) + _not_measured(cases) + f"\n\n{_origin(record)}"


def growth(record: dict[str, Any]) -> str:
    """Time and memory from 256 to 65,536 tokens, ours and the authors'."""
    found = micro(record) or {}
    cases = [case for case in found.get("cases", ()) if case.get("series") == "tokens"]
    if not cases:
        return NOT_MEASURED
    rows = []
    for case in cases:
        times, extra = case.get("times", {}), case.get("extra_bytes", {})
        seconds = [times.get(name, {}).get("seconds") for name in ("ours", "authors")]
        if seconds[0] is None:
            continue
        rows.append(
            [
                case["shape"],
                time_text(seconds[0]["median"]),
                time_text(seconds[1]["median"]) if seconds[1] else "-",
                memory_text(extra.get("ours")),
                memory_text(extra.get("authors")),
            ]
        )
    header = ("B x N x D", "ours", "authors'", "extra memory, ours", "authors'")
    return table(header, rows) + _not_measured(cases) + f"\n\n{_origin(found)}"


def independent(record: dict[str, Any]) -> str:
    """Tokens that do not resemble each other, the worst case of the CPU's coarse product."""
    cases = [case for case in record["cases"] if case.get("series") == "independent"]
    rows = [
        [
            f"{case['shape'].removesuffix(',independent')} {case['dtype']}",
            time_text(case["times"]["ours"]["seconds"]["median"]),
            _over_ours(case["times"], "authors"),
        ]
        for case in cases
        if "ours" in case.get("times", {})
    ]
    text = table(("B x N x D, independent tokens", "ours", "authors' / ours"), rows)
    return text + _not_measured(cases) if cases else NOT_MEASURED


def end_to_end(record: dict[str, Any]) -> str:
    """Time that guidance adds to a step and to an image, a row for each model."""
    rows = []
    models = models_of(record)
    if not models and not record.get("skipped"):
        return NOT_MEASURED
    for model in models:
        step, run = model["step"], model["run"]
        images = model["images"]
        cells = [
            f"{model['name']}, {images} images",
            time_text(step["without"]["seconds"]["median"]),
            *(interval_text(step[method]["added_share"]) for method in ("ours", "authors")),
            f"{model['guided_steps']} of {model['steps']}",
        ]
        for method in ("ours", "authors"):
            extra = signed_time(run[method]["added_seconds"]["median"] / images)
            cells.append(f"{extra}, {interval_text(run[method]['added_share'])}")
        rows.append([*cells, "timed" if run["measured"] else "added up"])
    header = (
        "model",
        "a step without",
        "ours adds to it",
        "authors' adds",
        "guided steps",
        "ours adds to an image",
        "authors' adds",
        "whole run",
    )
    skipped = (f"{name} ({why})" for name, why in record.get("skipped", {}).items())
    left_out = "; ".join(skipped)
    text = table(header, rows) if rows else NOT_MEASURED
    return text + (f"\n\nNot measured: {left_out}." if left_out else "") + f"\n\n{_origin(record)}"


def loaded(record: dict[str, Any]) -> str:
    """Times beside busy processes, a row for each shape."""
    rows = []
    for case in record["loaded"]:
        ours, alone = case["loaded"]["ours"], case["loaded"]["ours, 1 thread"]
        rows.append(
            [
                f"{case['shape']} {case['dtype']}",
                time_text(case["idle"]["ours"]["seconds"]["median"]),
                time_text(ours["seconds"]["median"]),
                f"{1 / alone['times_ours']['median']:.2f}",
                *(_over_ours(case["loaded"], rival) for rival in ("authors", "matmul")),
            ]
        )
    header = (
        *("B x N x D", "ours, idle", "ours, loaded", "of one thread's time, loaded"),
        *("authors' / ours, loaded", "bare matmul / ours, loaded"),
    )
    note = f"{record['busy_processes']} busy processes. {_origin(record)}"
    return table(header, rows) + "\n\n" + note
