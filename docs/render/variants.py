"""The tables of docs/beyond.md, from `python -m negtome_fast.studies.studies.variants`."""

from __future__ import annotations

from typing import Any

from .markers import table

COLUMNS = {
    "entropy": "attribute entropy, nats",
    "cosine": "pairwise cosine",
    "precision": "precision",
    "precision_decoded": "precision, real after the VAE",
    "frechet": "Frechet distance",
    "agreement": "prompt kept",
}


def _cells(condition: dict[str, Any], measures: tuple[str, ...]) -> list[str]:
    from negtome_fast.studies.studies.tables import measure_cell

    return [measure_cell(condition, measure) for measure in measures]


def forms(result: dict[str, Any]) -> str:
    """Other forms of the push, against the operator at the same precision."""
    from negtome_fast.studies.studies.tables import signed

    by_name = {one["name"]: one for one in result["conditions"]}
    rows = [
        [label, *_cells(by_name[label], ("entropy", "precision")), signed(found)]
        for label, found in result["at_matched_precision"].items()
    ]
    sizes = result["sizes"]
    origin = (
        f"{sizes['images']} images a condition, groups of {sizes['group']}, {sizes['steps']} "
        f"steps, {sizes['real']} real images; 95% intervals in brackets. "
        f"{result['date'][:10]}, torch {result['versions']['torch']}. "
        f"Made by `{result['command']}`."
    )
    header = ["form", "attribute entropy, nats", "precision", "entropy less the operator's"]
    return table(header, rows) + "\n\n" + origin


def operator(result: dict[str, Any]) -> str:
    """The operator and images without guidance, by all measures."""
    rows = [
        [one["name"], *_cells(one, tuple(COLUMNS))]
        for one in result["conditions"]
        if one["name"] not in result["at_matched_precision"]
    ]
    note = (
        f"Where all attributes are named, {result['named_attributes_shown']:.0%} of the images "
        "show them all; the last column asks for the style only."
    )
    return table(["condition", *COLUMNS.values()], rows) + "\n\n" + note


def rarity(result: dict[str, Any]) -> str:
    """Images inside the real manifold, by the number of uncommon attributes."""
    rows = [
        [name, *(f"{inside} of {count}" if count else "-" for count, inside in counts)]
        for name, counts in result["by_rarity"].items()
        if name not in result["at_matched_precision"]
    ]
    return table(["inside the real manifold", "common", "1", "2", "3 uncommon"], rows)
