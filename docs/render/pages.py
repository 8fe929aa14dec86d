"""The table of the generated parts: page -> name of the part -> function and result files.

To move a part to another page, move its line; the name in the page's marker stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.results import FOLDER as RESULTS
from negtome_fast.kernels.aot import TARGETS

from . import (
    applications,
    benchmarks,
    coverage,
    families,
    kernels,
    nudging,
    readme,
    studies,
    variants,
)
from .markers import NOT_MEASURED, fill, names


class Part:
    """A generated part of a page.

    Attributes:
        text: function from the content of the files to the text.
        files: JSON files below bench/results.
    """

    def __init__(self, text: Callable[..., str], *files: str) -> None:
        self.text, self.files = text, files

    def render(self, results: Path = RESULTS) -> str:
        """Text of the part; "not measured" if a file is missing."""
        paths = [results / file for file in self.files]
        if not all(path.is_file() for path in paths):
            return NOT_MEASURED
        return self.text(*(json.loads(path.read_text(encoding="utf-8")) for path in paths))


def _study(name: str) -> Part:
    return Part(partial(studies.table_of, name), f"eval/{name}.json")


PAGES: dict[str, dict[str, Part]] = {
    "README.md": {"results": Part(readme.table, *readme.FILES)},
    "docs/results.md": {
        "demo": Part(studies.demo, "demo.json"),
        "evidence": Part(studies.evidence, "eval/rivals.json"),
        "matched": Part(studies.matched, "eval/diversity.json"),
        "nudging": Part(studies.nudging, "eval/nudging.json"),
    },
    "docs/families.md": {"families": Part(families.table)},
    "docs/benchmarks.md": {
        "gpu": Part(benchmarks.speed, "gpu.json"),
        "gpu-growth": Part(benchmarks.growth, "gpu.json"),
        "cpu": Part(benchmarks.speed, "cpu.json"),
        "cpu-independent": Part(benchmarks.independent, "cpu.json"),
        "cpu-loaded": Part(benchmarks.loaded, "loaded-cpu.json"),
        "cpu-growth": Part(benchmarks.growth, "cpu-tokens.json"),
        "end-to-end-gpu": Part(benchmarks.end_to_end, "gpu.json"),
        "end-to-end-cpu": Part(benchmarks.end_to_end, "end-to-end-cpu.json"),
    },
    "docs/applications.md": {
        name: Part(partial(applications.example, name), "pictures.json")
        for name in ("diversity", "avoid", "style", "sharpen", "interpolate")
    },
    "docs/beyond.md": {
        "forms": Part(variants.forms, "eval/variants.json"),
        "operator": Part(variants.operator, "eval/variants.json"),
        "rarity": Part(variants.rarity, "eval/variants.json"),
    },
    "docs/evaluation.md": {
        "diversity": _study("diversity"),
        "conventions": _study("conventions"),
        "hyperparameters": _study("hyperparameters"),
        "rivals": _study("rivals"),
        "overheads": _study("overheads"),
        "protected": _study("protected"),
        "applications": _study("applications"),
    },
    "docs/kernels.md": {
        "candidates-sm_90": Part(partial(kernels.listed_candidates, "sm_90")),
        **{name: Part(partial(kernels.compiled, name), "compiled.json") for name in TARGETS},
        **{
            f"{name}-other": Part(partial(kernels.other_compiler, name), "compiled.json")
            for name in TARGETS
        },
    },
    "docs/measures.md": {
        "coverage": Part(coverage.table, "eval/coverage.json"),
    },
    "docs/nudging.md": {
        "demo": Part(nudging.demo, "eval/nudging-demo.json"),
        "chance": Part(nudging.chance, "eval/nudging.json"),
        "study": _study("nudging"),
        "goal": Part(nudging.goal, "eval/nudging.json"),
        "cost": _study("nudging-cost"),
    },
}

FIGURES: dict[str, Callable[[], None]] = {
    "docs/evaluation.md": lambda: studies.draw(PAGES["docs/evaluation.md"]),
    "docs/nudging.md": nudging.draw,
}
"""Page -> function that draws its figures anew."""


def render(page: str, text: str, results: Path = RESULTS) -> str:
    """`text` of a page with every part rendered from the files in `results`.

    Raises:
        ValueError: the page marks a part that the table does not have.
    """

    def body(name: str) -> str:
        if name not in PAGES[page]:
            raise ValueError(f"{page} marks {name!r}; its parts are {', '.join(PAGES[page])}")
        return PAGES[page][name].render(results)

    return fill(text, body)


def check_markers(page: str, text: str) -> None:
    """Raise ValueError if the table has a part of the page that `text` does not mark."""
    left_out = [name for name in PAGES[page] if name not in names(text)]
    if left_out:
        raise ValueError(f"{page} has no marker for {', '.join(left_out)}")
