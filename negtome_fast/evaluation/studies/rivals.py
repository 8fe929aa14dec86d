"""Rivals at matched quality: each with a small sweep of its own setting, on the same seeds.

A lower guidance scale is the first rival. All methods sweep over the same scales or start from the
model's own; the frontier of entropy against precision is what counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..frontier import matched
from ..rivals import CADS, SPELL, Baseline, IntervalGuidance, ParticleGuidance
from ..sampling import Condition
from ..scores import record, triple
from . import figures
from .diversity import preset
from .figures import BLUE, COLOURS, GREY, MARKERS, Series
from .study import SEED, Run, Study
from .tables import cell, markdown, measures_table, origin

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Rival:
    """A method and its sweep: guidance scale, the setting in words, and the method with it."""

    label: str
    sweep: Sequence[tuple[float, str, Baseline | None]]

    def conditions(self) -> list[Condition]:
        return [
            Condition(
                ", ".join(filter(None, (f"{self.label} {scale:g}", setting))),
                guidance_scale=scale,
                baseline=baseline,
            )
            for scale, setting, baseline in self.sweep
        ]


LOWER = "guidance scale"

#: Sweeps begin at what is visible and end where images fall apart; found on a few images each.
RIVALS = (
    Rival(LOWER, [(s, "", None) for s in (1.0, 1.5, 2.0, 2.5, 3.5, 5.0)]),
    Rival(
        "interval guidance",
        [
            (2.5, "to 0.84", IntervalGuidance(high=0.84)),
            (2.5, "to 0.6", IntervalGuidance(high=0.6)),
            (5.0, "to 0.6", IntervalGuidance(high=0.6)),
        ],
    ),
    Rival(
        "CADS",
        [
            (2.5, "tau1 0.8", CADS(tau1=0.8, tau2=1.0)),
            (2.5, "tau1 0.7", CADS(tau1=0.7, tau2=1.0)),
            (2.5, "tau1 0.6", CADS(tau1=0.6, tau2=0.9)),
            (2.5, "tau 0.9 to 0.95", CADS(tau1=0.9, tau2=0.95)),
            (2.5, "tau 0.75 to 0.95", CADS(tau1=0.75, tau2=0.95)),
            (1.5, "tau 0.75 to 0.95", CADS(tau1=0.75, tau2=0.95)),
        ],
    ),
    Rival(
        "particle guidance",
        [
            (2.5, "latents 100", ParticleGuidance(100.0, "clean", 0.5)),
            (2.5, "latents 400", ParticleGuidance(400.0, "clean", 0.5)),
            (2.5, "features 20", ParticleGuidance(20.0, "features", 0.5)),
        ],
    ),
    Rival(
        "SPELL",
        [
            (2.5, "radius 20", SPELL(20.0)),
            (2.5, "radius 30", SPELL(30.0)),
            (1.5, "radius 20", SPELL(20.0)),
        ],
    ),
)
#: NegToMe's own sweep: guidance scale, alpha of `others`. Alpha 0 is the lower guidance scale.
OURS = (
    (1.0, 0.5),
    (1.5, 0.5),
    (2.5, 0.5),
    (1.0, 0.3),
    (1.5, 0.3),
    (2.5, 0.3),
    (1.5, 0.15),
    (2.5, 0.15),
)
NOTE = (
    "NegToMe's frontier is over guidance scales and alpha, 0 included; a ratio above 1 means more "
    "entropy than the rival at its precision or better."
)


def conditions(run: Run) -> list[Condition]:
    found = [
        Condition(f"NegToMe {scale:g}, alpha {alpha:g}", scale, negtome=preset(alpha=alpha))
        for scale, alpha in run.sizes.chosen(OURS, OURS[2:3])
    ]
    for rival in RIVALS:
        own = rival.conditions()
        found += run.sizes.chosen(own, own[-1:])
    return found


def run(run: Run) -> dict[str, Any]:
    drawn = run.samples(conditions(run), seed=SEED)
    scores = run.scores(drawn)
    ours = [one for name, one in scores.items() if name.startswith(("NegToMe", LOWER))]
    gains = []
    for name, base in scores.items():
        if name.startswith("NegToMe"):
            continue
        found = matched(base, [one for one in ours if one is not base])
        gains.append(
            {
                "rival": name,
                "precision": round(found.level, 4),
                "rival_entropy": round(found.base, 4),
                "entropy": None if math.isnan(found.method) else round(found.method, 4),
                "ratio": None if found.ratio is None else triple(found.ratio),
            }
        )
    return {"conditions": [record(one) for one in scores.values()], "gains": gains}


def gains_table(result: dict[str, Any]) -> str:
    rows = []
    for gain in result["gains"]:
        reached = gain["entropy"] is not None
        rows.append(
            [
                gain["rival"],
                f"{gain['precision']:.3f}",
                f"{gain['rival_entropy']:.2f}",
                f"{gain['entropy']:.2f}" if reached else "not reached",
                cell(gain["ratio"]) if gain["ratio"] else "-",
            ]
        )
    header = ["rival", "its precision", "its entropy", "NegToMe at that precision", "ratio"]
    return markdown(header, rows)


def table(result: dict[str, Any]) -> str:
    return "\n\n".join(
        [gains_table(result), NOTE, measures_table(result["conditions"]), origin(result)]
    )


def draw(result: dict[str, Any]) -> dict[str, Figure]:
    frontier, grid = figures.panels(9.5, 6)
    axes = grid[0][0]
    labels = ["NegToMe", *(rival.label for rival in RIVALS)]
    palette = (BLUE, GREY, *COLOURS)
    series = []
    for number, label in enumerate(labels):
        own = [one for one in result["conditions"] if one["name"].startswith(label)]
        notes = [one["name"].removeprefix(label).strip() for one in own]
        marker = "o" if number < 2 else MARKERS[number - 2]
        series.append(Series(label, own, palette[number], marker, notes))
    figures.frontier(axes, series)
    figures.tidy(
        axes,
        "NegToMe and its rivals; guidance scale and, after it, the rival's own setting",
        "precision",
        "attribute entropy, nats",
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8.5)
    return {"frontier": frontier}


STUDY = Study("rivals", "other methods at matched precision", 128, run, table, draw)
