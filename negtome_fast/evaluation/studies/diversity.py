"""Diversity over the sweep of guidance scales: unguided, `first`, `others`, and the authors' order.

The settings were chosen on other seeds by the study of hyperparameters. The question: at the
precision and prompt agreement of each unguided scale, how many times its attribute entropy?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...config import NegToMeConfig
from ...generate import APPLICATIONS
from ...models.avatars import ATTRIBUTES, OPEN_ATTRIBUTES
from ..frontier import matched
from ..sampling import Condition
from ..scores import record, triple
from . import figures
from .figures import BLUE, COLOURS, GREY, Series
from .study import SEED, Run, Study
from .tables import cell, markdown, measures_table, origin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = (1.0, 1.5, 2.0, 2.5, 3.5, 5.0)
FEW_SCALES = (1.0, 2.5)
TOLERANCE = 0.01
"""Prompt agreement of a guided condition may lie this far below the unguided one's."""

#: The entropy of the balanced world, nats: nothing can be above.
CEILING = sum(math.log(len(ATTRIBUTES[name])) for name in OPEN_ATTRIBUTES) / len(OPEN_ATTRIBUTES)


def preset(**overrides: Any) -> NegToMeConfig:
    """The package's settings for diversity on the embedded model."""
    application = APPLICATIONS["diversity"]
    return NegToMeConfig(**{**application.guidance, **application.embedded, **overrides})


#: A method's name in tables, its label in figures, its settings, and its scales.
METHODS: dict[str, tuple[str, dict[str, Any] | None, Sequence[float]]] = {
    "off": ("unguided", None, SCALES),
    "others": ("NegToMe, others", {"reference": "others"}, SCALES),
    "first": ("NegToMe, first", {"reference": "first"}, (1.0, 1.5, 2.5, 5.0)),
    "official": (
        "first, matched as in the authors' code",
        {"reference": "first", "matching": "official"},
        (1.0, 2.5, 5.0),
    ),
}


def conditions(run: Run) -> list[Condition]:
    return [
        Condition(
            f"{name} {scale:g}",
            guidance_scale=scale,
            negtome=None if changed is None else preset(**changed),
        )
        for name, (_, changed, scales) in METHODS.items()
        for scale in run.sizes.chosen(scales, [s for s in FEW_SCALES if s in scales])
    ]


def run(run: Run) -> dict[str, Any]:
    drawn = run.samples(conditions(run), seed=SEED)
    scores = run.scores(drawn)
    off = {name: one for name, one in scores.items() if name.startswith("off ")}
    gains = []
    for name, base in off.items():
        agreement = float(base.hits.double().mean())
        for method in [m for m in METHODS if m != "off"]:
            points = [
                one
                for other, one in scores.items()
                if other.startswith(f"{method} ")
                and float(one.hits.double().mean()) >= agreement - TOLERANCE
            ]
            found = matched(base, points)
            gains.append(
                {
                    "base": name,
                    "method": method,
                    "precision": round(found.level, 4),
                    "base_entropy": round(found.base, 4),
                    "entropy": None if math.isnan(found.method) else round(found.method, 4),
                    "ratio": None if found.ratio is None else triple(found.ratio),
                    "reached": round(found.reached, 3),
                }
            )
    scale = 2.5
    run.sheet(
        "samples",
        f"Guidance scale {scale:g}: unguided and guided from the same seeds",
        {
            f"{METHODS[method][0]}": drawn[f"{method} {scale:g}"]
            for method in ("off", "others", "first")
        },
    )
    return {
        "ceiling": round(CEILING, 4),
        "preset": preset().to_dict(),
        "conditions": [
            record(one, scores.get("off " + name.split()[1])) for name, one in scores.items()
        ],
        "gains": gains,
    }


def gains_table(result: dict[str, Any], method: str = "others") -> str:
    """At each unguided condition's precision: entropy of the method's frontier, and the ratio."""
    rows = []
    for gain in result["gains"]:
        if gain["method"] != method:
            continue
        reached = gain["entropy"] is not None
        rows.append(
            [
                gain["base"].replace("off ", "scale "),
                f"{gain['precision']:.3f}",
                f"{gain['base_entropy']:.2f}",
                f"{gain['entropy']:.2f}" if reached else "not reached",
                cell(gain["ratio"]) if gain["ratio"] else "-",
            ]
        )
    header = [
        "unguided at",
        "its precision",
        "its entropy",
        f"`{method}` at that precision",
        "ratio",
    ]
    return markdown(header, rows)


def table(result: dict[str, Any]) -> str:
    note = (
        f"Entropy of the balanced world: {result['ceiling']:.2f} nats. The frontier of `others` is "
        "over its whole sweep of scales; a row asks for at least the unguided precision and the "
        f"prompt agreement within {TOLERANCE:g}."
    )
    parts = [gains_table(result), note, measures_table(result["conditions"]), origin(result)]
    return "\n\n".join(parts)


def _series(result: dict[str, Any]) -> list[Series]:
    colours = {"off": GREY, "others": BLUE, "first": COLOURS[0], "official": COLOURS[2]}
    markers = {"off": "o", "others": "o", "first": "s", "official": "D"}
    found = []
    for method, (label, _, _) in METHODS.items():
        own = [c for c in result["conditions"] if c["name"].split()[0] == method]
        notes = [c["name"].split()[1] for c in own]
        found.append(Series(label, own, colours[method], markers[method], notes))
    return found


def draw(result: dict[str, Any]) -> dict[str, Figure]:
    series = _series(result)
    frontier, grid = figures.panels(8.2, 5.4)
    axes = grid[0][0]
    figures.frontier(axes, series)
    axes.axhline(result["ceiling"], color="#999999", linewidth=0.8, linestyle=":")
    figures.tidy(
        axes,
        "Diversity against quality; numbers are guidance scales",
        "precision: share inside the manifold of balanced real images",
        "attribute entropy, nats",
    )
    axes.legend(frameon=False, fontsize=9)
    axes.set_ylim(bottom=0)

    sweeps, grid = figures.panels(12, 3.6, 3)
    for axes, measure, label in zip(
        grid[0],
        ("entropy", "cosine", "precision"),
        ("attribute entropy, nats", "pairwise cosine (lower: more diverse)", "precision"),
        strict=True,
    ):
        for one in series:
            at = [float(c["name"].split()[1]) for c in one.conditions]
            figures.sweep(axes, [one], at, measure)
        figures.tidy(axes, label, "guidance scale", "")
    grid[0][0].legend(frameon=False, fontsize=8)
    return {"frontier": frontier, "sweep": sweeps}


STUDY = Study(
    "diversity",
    "guidance scale x reference, and the ratio at matched precision",
    128,
    run,
    table,
    draw,
)
