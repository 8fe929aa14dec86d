"""Parts of pages from results of `negtome-fast demo` and of studies (`negtome-fast eval`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.results import FOLDER

from .markers import table

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
"""Condition of the study of rivals -> its name in the table of evidence."""


def demo(record: dict[str, Any]) -> str:
    """Measures of the demo without -> with guidance, a row for each prompt."""
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
    return table(header, rows) + "\n\n" + note


def evidence(record: dict[str, Any]) -> str:
    """Diversity and its price, from `negtome-fast eval rivals`, with 95% intervals."""
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
    return "\n\n".join((table(header, rows), images + _study_origin(record)))


def matched(record: dict[str, Any]) -> str:
    """Guided images against the best scale without guidance, from `eval diversity`."""
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
    return table(header, rows)


def nudging(record: dict[str, Any]) -> str:
    """Share of memorised outputs, from `negtome-fast eval nudging`, with 95% intervals."""
    rows = []
    for subject in record["subjects"]:
        for one in subject["methods"]:
            label = record["methods"].get(one["name"], "the first attempt")
            shares = (one["measures"][name] for name in ("memorised", "agreement"))
            cells = [_estimate(share, ".0%") for share in shares]
            rows.append([f"{subject['label']} ({subject['images']} images)", label, *cells])
    header = ["what was memorised", "further attempts", "memorised", "prompt kept"]
    return "\n\n".join((table(header, rows), _study_origin(record)))


def _estimate(values: Sequence[float], form: str) -> str:
    """An estimate and its interval; a share of exactly 0 or 1 has no interval."""
    estimate, low, high = (format(max(value, 0.0), form) for value in values)
    return estimate if low == high else f"{estimate} [{low}, {high}]"


def _study_origin(record: dict[str, Any]) -> str:
    return (
        f"{record['sizes']['steps']} steps; on {record['cpu']}, "
        f"torch {record['versions']['torch']}; {record['date'][:10]}. "
        f"Made by `{record['command']}`."
    )


def table_of(name: str, record: dict[str, Any]) -> str:
    """The table of a study of `negtome-fast eval`."""
    from negtome_fast.studies.studies import STUDIES

    return STUDIES[name].table(record)


def draw(names: Iterable[str]) -> None:
    """Write the table and the figures of studies beside their results."""
    from negtome_fast.studies.studies import STUDIES
    from negtome_fast.studies.studies.study import load, write

    folder = FOLDER / "eval"
    for name in names:
        path = folder / f"{name}.json"
        if path.is_file():
            write(STUDIES[name], load(path), folder)
