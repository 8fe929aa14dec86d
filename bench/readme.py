"""`python -m bench.readme`: writes the tables of `PAGES` from the files in bench/results/.

A table stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; a missing file reads "not
measured". That of the supported models comes from the layouts and the families of the tests. With
--check nothing is written, and a table that is not up to date exits with 1.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._path import ROOT
from .marked import NOTHING, Tables, body_of, fill, update
from .readme_rows import FILES, results_table
from .results import FOLDER as RESULTS
from .results import end_to_end, micro
from .tables import (
    ceilings_line,
    interval_text,
    machine_line,
    memory_text,
    rate_cells,
    signed_time,
    time_text,
)

PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("results.md", "benchmarks.md", "families.md")),
)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo_table(record: dict[str, Any]) -> str:
    """The demo's measures: a prompt a row, without -> with guidance."""
    rows = []
    for result in record["results"]:
        without, guided = result["without"], result["guided"]
        entropy = "-"
        if without["entropy"] is not None:
            entropy = f"{without['entropy']:.2f} -> {guided['entropy']:.2f}"
        rows.append(
            [
                result["prompt"],
                f"{without['cosine']:.3f} -> {guided['cosine']:.3f}",
                entropy,
                f"{without['agreement']:.0%} -> {guided['agreement']:.0%}",
                f"{without['seconds']:.2f} -> {guided['seconds']:.2f}",
                f"{result['pushed']:.0%}",
                result["verdict"],
            ]
        )
    header = (
        "prompt",
        "pairwise feature cosine",
        "entropy of open attributes",
        "prompt kept",
        "s / image",
        "tokens pushed",
        "verdict",
    )
    note = (
        f"{record['images_per_prompt']} images a prompt, seeds from {record['seed']}, on "
        f"{record['device']}, torch {record['torch']}; entropy in nats. Made by `make demo "
        'ARGS="--output bench/results/demo.png"`.'
    )
    return _markdown(header, rows) + "\n\n" + note


def _over_ours(times: dict[str, Any], candidate: str) -> str:
    taken = times.get(candidate)
    if not taken:
        return "-"
    return f"{taken['times_ours']['median']:.2f}" if "times_ours" in taken else "failed"


def _not_measured(cases: Sequence[dict[str, Any]]) -> str:
    """What was left out and why, and what was wrong: a sentence, or nothing."""
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


def speed_table(record: dict[str, Any]) -> str:
    """The microbenchmark: a shape a row; ratios are medians of paired rounds."""
    found = micro(record)
    if found is None:
        return "not measured"
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
    return _markdown(header, rows) + _not_measured(cases) + f"\n\n{_origin(record)}"


def growth_table(record: dict[str, Any]) -> str:
    """Time and memory from 256 to 65,536 tokens, ours and the authors'."""
    found = micro(record) or {}
    cases = [case for case in found.get("cases", ()) if case.get("series") == "tokens"]
    if not cases:
        return "not measured"
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
    return _markdown(header, rows) + _not_measured(cases) + f"\n\n{_origin(found)}"


def independent_table(record: dict[str, Any]) -> str:
    """Tokens of which none resembles another, the worst for the coarse product of the CPU."""
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
    table = _markdown(("B x N x D, independent tokens", "ours", "authors' / ours"), rows)
    return table + _not_measured(cases) if cases else "not measured"


def end_to_end_table(record: dict[str, Any]) -> str:
    """What guidance adds to a step and to an image: a model a row."""
    rows = []
    models = end_to_end(record)
    if not models and not record.get("skipped"):
        return "not measured"
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
    table = _markdown(header, rows) if rows else "not measured"
    return table + (f"\n\nNot measured: {left_out}." if left_out else "") + f"\n\n{_origin(record)}"


def image_place(layout: Any) -> str:
    """Where the image lies in an attention output that is one tensor."""
    if layout.grid_modules:
        return "all, a grid for each resolution"
    if layout.joint is None:
        return "after each caption" if layout.captions else "all"
    return "after the text" if layout.joint == "text_first" else "before the text"


def tested_as(tests: Sequence[Any]) -> str:
    """What the tests run of the pipelines of one class: they name them where that differs."""
    kinds = {
        kind: ", ".join(dict.fromkeys(test.note for test in tests if test.whole is whole))
        for kind, whole in (("whole pipeline", True), ("denoiser alone", False))
        if any(test.whole is whole for test in tests)
    }
    if len(kinds) == 1:
        return next(iter(kinds))
    named = (f"{kind} ({names})" if names else kind for kind, names in kinds.items())
    return "; ".join(named) or "not run"


def families_table() -> str:
    """The classes of denoisers that are known: one a row, in the order of the code."""
    from negtome_fast.pipelines import known_layouts

    sys.path.insert(0, str(ROOT / "tests"))
    try:
        tests = importlib.import_module("helpers.families").FAMILIES.values()
    finally:
        sys.path.remove(str(ROOT / "tests"))
    rows = [
        [
            layout.family,
            f"`{name}`",
            image_place(layout),
            "one batch" if layout.guidance == "concatenated" else "one call each",
            tested_as([test for test in tests if test.model == name]),
        ]
        for name, layout in known_layouts().items()
    ]
    header = (
        "family",
        "denoiser",
        "image tokens in the attention output",
        "guidance halves",
        "tested as",
    )
    return _markdown(header, rows)


#: Conditions of the study of rivals that the README shows, and what it calls them.
EVIDENCE = {
    "guidance scale 2.5": "without guidance, scale 2.5",
    "guidance scale 1": "a lower scale, 1",
    "interval guidance 2.5, to 0.6": "interval guidance",
    "CADS 1.5, tau 0.75 to 0.95": "CADS, scale 1.5",
    "particle guidance 1, latents 100": "particle guidance, scale 1",
    "SPELL 1, radius 20": "SPELL, scale 1",
    "NegToMe 2.5, alpha 0.3": "NegToMe `others`, alpha 0.3, scale 2.5",
    "NegToMe 2.5, alpha 0.5": "NegToMe `others`, alpha 0.5, scale 2.5",
    "NegToMe 1.5, alpha 0.5": "NegToMe `others`, alpha 0.5, scale 1.5",
}


def evidence_table(record: dict[str, Any]) -> str:
    """Diversity and its price, of `negtome-fast eval rivals`; intervals are of 95%."""
    measures = {one["name"]: one["measures"] for one in record["conditions"]}

    rows = [
        [
            label,
            _estimate(measures[name]["entropy"], ".2f"),
            _estimate(measures[name]["cosine"], ".3f"),
            _estimate(measures[name]["precision"], ".2f"),
            _estimate(measures[name]["agreement"], ".0%"),
        ]
        for name, label in EVIDENCE.items()
    ]
    header = ["method", "entropy of open attributes", "pairwise cosine", "precision", "prompt kept"]
    images = f"{record['sizes']['images']} images a row, "
    return "\n\n".join((_markdown(header, rows), images + _study_origin(record)))


def matched_table(record: dict[str, Any]) -> str:
    """Guided against the best unguided guidance scales, of `negtome-fast eval diversity`."""
    rows = [
        [
            f"{one['level']:g}",
            f"{one['off_entropy']:.2f}",
            f"{one['entropy']:.2f}",
            "{:.2f} [{:.2f}, {:.2f}]".format(*one["ratio"]),
        ]
        for one in record["frontiers"]
        if one["quality"] == "precision"
    ]
    header = ["precision at least", "entropy without guidance, best scale", "guided", "ratio"]
    return _markdown(header, rows)


def nudging_table(record: dict[str, Any]) -> str:
    """Share of memorised outputs, of `negtome-fast eval nudging`; intervals are of 95%."""
    rows = []
    for subject in record["subjects"]:
        for one in subject["methods"]:
            label = record["methods"].get(one["name"], "the first attempt")
            shares = (one["measures"][name] for name in ("memorised", "agreement"))
            cells = [_estimate(share, ".0%") for share in shares]
            rows.append([f"{subject['label']} ({subject['images']} images)", label, *cells])
    header = ["what was memorised", "further attempts", "memorised", "prompt kept"]
    return "\n\n".join((_markdown(header, rows), _study_origin(record)))


def _estimate(values: Sequence[float], form: str) -> str:
    """An estimate and its interval; a share of exactly 0 or 1 has none."""
    estimate, low, high = (format(max(value, 0.0), form) for value in values)
    return estimate if low == high else f"{estimate} [{low}, {high}]"


def _study_origin(record: dict[str, Any]) -> str:
    return (
        f"{record['sizes']['steps']} steps; on {record['cpu']}, "
        f"torch {record['versions']['torch']}; {record['date'][:10]}. "
        f"Made by `{record['command']}`."
    )


def loaded_table(record: dict[str, Any]) -> str:
    """Times beside busy processes: a shape a row."""
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
    return _markdown(header, rows) + "\n\n" + note


TABLES: Tables = {
    "demo": ("demo.json", demo_table),
    "evidence": ("eval/rivals.json", evidence_table),
    "matched": ("eval/diversity.json", matched_table),
    "nudging": ("eval/nudging.json", nudging_table),
    "cpu": ("cpu.json", speed_table),
    "cpu-independent": ("cpu.json", independent_table),
    "cpu-loaded": ("loaded-cpu.json", loaded_table),
    "cpu-growth": ("cpu-tokens.json", growth_table),
    "end-to-end-cpu": ("end-to-end-cpu.json", end_to_end_table),
    "end-to-end-gpu": ("gpu.json", end_to_end_table),
    "gpu": ("gpu.json", speed_table),
    "gpu-growth": ("gpu.json", growth_table),
}


def render(text: str, results: Path = RESULTS) -> str:
    """`text` with every marked table rewritten from `results`.

    Raises:
        ValueError: a mark that names no table.
    """

    def body(name: str) -> str:
        if name == "families":
            return families_table()
        if name == "results":
            paths = [results / file for file in FILES]
            if not all(path.is_file() for path in paths):
                return NOTHING
            return results_table(*(json.loads(path.read_text("utf-8")) for path in paths))
        return body_of(name, TABLES, results)

    return fill(text, body)


def main(argv: Sequence[str] | None = None) -> int:
    return max(update("bench.readme", __doc__, page, render, argv) for page in PAGES)


if __name__ == "__main__":
    sys.exit(main())
