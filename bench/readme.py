"""`python -m bench.readme`: writes the tables of README.md from the files in bench/results/.

A table stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; a missing file reads "not
measured". With --check nothing is written, and a table that is not up to date exits with 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ._path import ROOT
from .report import machine_line, memory_text, time_text

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"


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


def speed_table(record: dict[str, Any]) -> str:
    """The microbenchmark: a shape a row; ratios are medians of paired rounds."""
    rows = []
    for case in record["cases"]:
        name = f"{case['shape']} {case['dtype']}"
        if "skipped" in case or "wrong" in case:
            reason = case.get("skipped") or f"wrong: {case['wrong']}"
            rows.append([name, reason, *["-"] * 6])
            continue

        times = case.get("times", {})  # shapes that are there for their memory have none

        def over_ours(candidate: str, times: dict[str, Any] = times) -> str:
            if not times:
                return "-"
            ratio = times.get(candidate, {}).get("times_ours")
            return f"{ratio['median']:.2f}" if ratio else "failed"

        extra = case.get("extra_bytes", {})
        rows.append(
            [
                name,
                time_text(times["ours"]["seconds"]["median"]) if times else "-",
                *(over_ours(c) for c in ("authors", "authors-compiled", "matmul", "matmul-into")),
                memory_text(extra.get("ours")),
                memory_text(extra.get("authors")),
            ]
        )
    header = (
        "B x N x D",
        "ours",
        "authors' / ours",
        "authors' compiled / ours",
        "bare matmul / ours",
        "matmul, no allocation / ours",
        "extra memory, ours",
        "authors'",
    )
    return _markdown(header, rows) + f"\n\n{machine_line(record)}; {record['date'][:10]}."


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("demo.json", demo_table),
    "cpu": ("cpu.json", speed_table),
    "gpu": ("gpu.json", speed_table),
}


def render(text: str, results: Path = RESULTS) -> str:
    """`text` with every marked table rewritten from `results`.

    Raises:
        ValueError: a mark that names no table.
    """

    def replace(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in TABLES:
            raise ValueError(f"README marks the table {name!r}; known: {', '.join(TABLES)}")
        file, table = TABLES[name]
        path = results / file
        body = "not measured"
        if path.exists():
            body = table(json.loads(path.read_text(encoding="utf-8")))
        return f"<!-- begin: {name} -->\n{body}\n<!-- end: {name} -->"

    pattern = r"<!-- begin: (?P<name>\w+) -->\n.*?<!-- end: (?P=name) -->"
    return re.sub(pattern, replace, text, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    rendered = render(text)
    if options.check:
        if rendered != text:
            print("README.md is not up to date: run python -m bench.readme", file=sys.stderr)
        return int(rendered != text)
    README.write_text(rendered, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
