"""`python -m bench.evaluation`: the tables of docs/evaluation.md, from bench/results/eval/.

A study's tables stand between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; a missing file reads
"not measured". The figures of these studies are drawn anew. With --check nothing is written, and a
page that is not up to date exits with 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from negtome_fast.studies.studies import STUDIES
from negtome_fast.studies.studies.study import load, write

from ._path import ROOT
from .marked import NOTHING, PART, fill, update

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


def draw(text: str) -> None:
    """Tables and figures of every marked study, beside its result."""
    for name in (part["name"] for part in PART.finditer(text)):
        path = RESULTS / f"{name}.json"
        if path.is_file():
            write(STUDIES[name], load(path), RESULTS)


def main(argv: Sequence[str] | None = None) -> int:
    return update("bench.evaluation", __doc__, PAGE, render, argv, before=draw)


if __name__ == "__main__":
    sys.exit(main())
