"""Parts and figures of docs/nudging.md, from `negtome-fast eval nudging` and a demonstration."""

from __future__ import annotations

import json
from typing import Any

from bench._path import ROOT
from bench.results import FOLDER

from .markers import table


def goal(result: dict[str, Any]) -> str:
    """The parts of the goal, a row for each model, for `nudge` and for `both`."""
    from negtome_fast.studies.studies import nudging

    rows: list[list[str]] = []
    header: list[str] = []
    for method in ("nudge", "both"):
        for model, parts in nudging.goal(result, method).items():
            header = ["memorised by", "method", *parts]
            rows.append([model, method, *parts.values()])
    return table(header, rows)


def chance(result: dict[str, Any]) -> str:
    """Distances of ordinary avatars to memorised images and to desired points."""
    subjects = result["subjects"]
    near = "; ".join(f"{one['label']}: {one['ordinary_nearest_desired']:.3f}" for one in subjects)
    shares = "; ".join(f"{one['label']}: {one['near_by_chance']:.1%}" for one in subjects)
    return (
        "Of 400 balanced avatars that no model drew, so many lie within "
        f"{result['pixels_threshold']:g} of a memorised image by chance: {shares}. Other avatars "
        f"that fit the prompts are this far from the nearest desired point: {near}."
    )


def demo(record: dict[str, Any]) -> str:
    """Images that `negtome-fast nudge` flagged and repaired, a row for each prompt."""
    rows = [
        [
            one["prompt"],
            f"{one['flagged_before']} of {len(one['attempts'])}",
            f"{one['flagged_after']} of {len(one['attempts'])}",
            ", ".join(str(count) for count in one["attempts"]),
        ]
        for one in record["prompts"]
    ]
    header = ["prompt", "flagged before", "flagged after", "generations of each image"]
    return table(header, rows)


def draw() -> None:
    """Draw the figures of the study's result into docs/pictures."""
    from negtome_fast.studies.studies import nudging

    path = FOLDER / "eval" / "nudging.json"
    if path.is_file():
        for name, figure in nudging.STUDY.figures(json.loads(path.read_text())).items():
            figure.savefig(ROOT / "docs" / "pictures" / f"nudging-{name}.png")
