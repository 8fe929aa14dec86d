"""Markdown tables of the studies' results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..scores import MEASURES, POINT_MEASURES

COLUMNS = ("entropy", "cosine", "precision", "recall", "frechet", "agreement")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(values: Sequence[float | None], digits: int = 2) -> str:
    """Return `estimate [low, high]`; an unbounded end is infinite."""
    estimate, low, high = ("inf" if value is None else f"{value:.{digits}f}" for value in values)
    return f"{estimate} [{low}, {high}]"


def signed(values: Sequence[Any], digits: int = 2) -> str:
    """Return `+estimate [+low, +high]`."""
    estimate, low, high = (f"{value:+.{digits}f}" for value in values[:3])
    return f"{estimate} [{low}, {high}]"


def measure_cell(condition: dict[str, Any], name: str) -> str:
    """Return a measure of a condition's record as text."""
    value = condition["measures"][name]
    if name in POINT_MEASURES:
        return f"{value:.{POINT_MEASURES[name][1]}f}"
    if name == "agreement":
        return f"{value[0]:.1%}"
    return cell(value, MEASURES[name].digits)


def measures_table(conditions: Iterable[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """Return a Markdown table with a row per condition."""
    labels = [MEASURES[n].label if n in MEASURES else POINT_MEASURES[n][0] for n in columns]
    rows = [
        [condition["name"], *(measure_cell(condition, name) for name in columns)]
        for condition in conditions
    ]
    return markdown(["condition", *labels], rows)


def origin(result: dict[str, Any]) -> str:
    """Return a note that says how a table was made, and by which command."""
    sizes, versions = result["sizes"], result["versions"]
    return (
        f"{sizes['images']} images a condition, groups of {sizes['group']}, {sizes['steps']} "
        "steps; 95% intervals in brackets, each for one value alone: about one in twenty misses "
        "the truth, and a share of exactly 0 or 1 has none. "
        f"torch {versions['torch']}, {result['date'][:10]}. "
        f"Made by `{result['command']}`."
    )
