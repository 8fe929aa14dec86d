"""`python -m bench.evaluation`: the tables of docs/evaluation.md, from bench/results/eval/.

A study's tables stand between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; a missing file reads
"not measured". The figures of these studies are drawn anew. With --check nothing is written, and a
page that is not up to date exits with 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from negtome_fast.evaluation.studies import STUDIES
from negtome_fast.evaluation.studies.study import load, write

from ._path import ROOT
from .marked import NOTHING, PART, fill

PAGE = ROOT / "docs" / "evaluation.md"
RESULTS = ROOT / "bench" / "results" / "eval"


def render(text: str, results: Path = RESULTS) -> str:
    """`text` with the tables of every marked study.

    Raises:
        ValueError: a mark that names no study.
    """

    def body(name: str) -> str:
        if name not in STUDIES:
            raise ValueError(f"{PAGE.name} marks {name!r}; the studies are {', '.join(STUDIES)}")
        path = results / f"{name}.json"
        return STUDIES[name].table(load(path)) if path.is_file() else NOTHING

    return fill(text, body)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evaluation", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    text = PAGE.read_text(encoding="utf-8")
    rendered = render(text)
    if options.check:
        if rendered != text:
            print(f"{PAGE.name} is not up to date: python -m bench.evaluation", file=sys.stderr)
        return int(rendered != text)
    for name in (part["name"] for part in PART.finditer(text)):
        path = RESULTS / f"{name}.json"
        if path.is_file():
            write(STUDIES[name], load(path), RESULTS)
    PAGE.write_text(rendered, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
