"""Rivals at matched quality, each with a small sweep of its settings, on the same seeds.

The first rival is a lower guidance scale. All methods sweep over the same scales or start from the
model's own. The frontiers of entropy against precision are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..conditions import Condition
from ..frontier import compared
from ..rivals import CADS, SPELL, Baseline, IntervalGuidance, ParticleGuidance
from ..scores import corrected, record
from . import figures
from .diversity import preset
from .figures import BLUE, COLOURS, GREY, MARKERS, Series
from .study import SEED, Study, StudyRun
from .tables import cell, markdown, measures_table, origin

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Rival:
    """A method and its sweep: guidance scale, the setting in words, and the method so set."""

    label: str
    sweep: Sequence[tuple[float, str, Baseline | None]]

    def conditions(self) -> list[Condition]:
        """Return the conditions of the sweep."""
        return [
            Condition(
                ", ".join(filter(None, (f"{self.label} {scale:g}", setting))),
                guidance_scale=scale,
                baseline=baseline,
            )
            for scale, setting, baseline in self.sweep
        ]


LOWER = "guidance scale"


def _cads(low: float, high: float) -> tuple[str, Baseline]:
    return f"tau {low:g} to {high:g}", CADS(tau1=low, tau2=high)


def _interval(high: float) -> tuple[str, Baseline]:
    return f"to {high:g}", IntervalGuidance(high=high)


def _features(strength: float) -> tuple[str, Baseline]:
    return f"features {strength:g}", ParticleGuidance(strength, "features", 0.5)


def _latents(strength: float) -> tuple[str, Baseline]:
    return f"latents {strength:g}", ParticleGuidance(strength, "clean", 0.5)


def _spell(radius: float) -> tuple[str, Baseline]:
    return f"radius {radius:g}", SPELL(radius)


#: Sweeps go from the first visible effect to images that fall apart, at the model's own guidance
#: scale and at lower ones; the ends were found on a few images each. CADS sweeps over tau1 and
#: tau2: with rescaling, a condition of gamma 0 is pure noise, whatever its `scale`.
RIVALS = (
    Rival(LOWER, [(s, "", None) for s in (1.0, 1.25, 1.5, 2.0, 2.5, 3.5, 5.0)]),
    Rival(
        "interval guidance",
        [(2.5, *_interval(high)) for high in (0.95, 0.9, 0.84, 0.74, 0.6)]
        + [(1.5, *_interval(0.9)), (5.0, *_interval(0.84)), (5.0, *_interval(0.6))],
    ),
    Rival(
        "CADS",
        [(2.5, *_cads(low, 1.0)) for low in (0.9, 0.8, 0.7)]
        + [(2.5, *_cads(low, high)) for low, high in ((0.9, 0.95), (0.75, 0.95), (0.6, 0.9))]
        + [(1.5, *_cads(low, high)) for low, high in ((0.9, 1.0), (0.8, 1.0), (0.9, 0.95))]
        + [(1.5, *_cads(0.75, 0.95))]
        + [(1.0, *_cads(low, high)) for low, high in ((0.8, 1.0), (0.9, 0.95))],
    ),
    Rival(
        "particle guidance",
        [(2.5, *_latents(strength)) for strength in (50.0, 100.0, 200.0, 400.0)]
        + [(1.5, *_latents(strength)) for strength in (50.0, 100.0, 400.0)]
        + [(1.0, *_latents(strength)) for strength in (50.0, 100.0, 200.0)]
        + [(2.5, *_features(strength)) for strength in (20.0, 60.0, 120.0)]
        + [(1.5, *_features(strength)) for strength in (20.0, 60.0)],
    ),
    Rival(
        "SPELL",
        [(2.5, *_spell(radius)) for radius in (15.0, 20.0, 30.0, 40.0)]
        + [(1.5, *_spell(radius)) for radius in (15.0, 20.0, 30.0)]
        + [(1.0, *_spell(radius)) for radius in (15.0, 20.0, 30.0)],
    ),
)
#: NegToMe's sweep: guidance scale and alpha of `others`. Alpha 0 is the lower guidance scale.
OURS = (
    (1.0, 0.5),
    (1.5, 0.5),
    (2.5, 0.5),
    (1.0, 0.3),
    (1.5, 0.3),
    (2.5, 0.3),
    (1.0, 0.15),
    (1.5, 0.15),
    (2.5, 0.15),
)
LEVELS = (0.3, 0.4, 0.5, 0.6)
NOTE = (
    "Entropy of the two frontiers at a precision of at least the column's. NegToMe's is over "
    "guidance scales and alpha, 0 included; a rival's is over its settings and all unguided "
    "scales. A ratio above 1 is NegToMe's; a level is left out where one of them does not reach it."
)


def conditions(run: StudyRun) -> list[Condition]:
    """Return the conditions of NegToMe and of all rivals."""
    found = [
        Condition(f"NegToMe {scale:g}, alpha {alpha:g}", scale, negtome=preset(alpha=alpha))
        for scale, alpha in run.sizes.chosen(OURS, OURS[2:3])
    ]
    for rival in RIVALS:
        own = rival.conditions()
        found += run.sizes.chosen(own, own[-1:])
    return found


def run(run: StudyRun) -> dict[str, Any]:
    """Draw all conditions, and compare NegToMe's frontier with each rival's."""
    drawn = run.samples(conditions(run), seed=SEED)
    scores = run.scores(drawn)
    # Unguided is alpha 0, so the frontier of the method has these points as well.
    ours = [one for name, one in scores.items() if name.startswith(("NegToMe", LOWER))]
    gains = []
    for rival in RIVALS:
        # A rival may use every lower guidance scale as well.
        labels = (rival.label, LOWER)
        theirs = [one for name, one in scores.items() if name.startswith(labels)]
        for level in LEVELS:
            found = compared(ours, theirs, level)
            gains.append(
                {
                    "rival": rival.label,
                    "precision": level,
                    "entropy": None if math.isnan(found.method) else round(found.method, 4),
                    "rival_entropy": None if math.isnan(found.rival) else round(found.rival, 4),
                    "ratio": corrected(found.ratio),
                }
            )
    return {"conditions": [record(one) for one in scores.values()], "gains": gains}


def gains_table(result: dict[str, Any]) -> str:
    """Return Markdown with a row per rival: both frontiers at each level, and the ratio."""
    rows = []
    for label in dict.fromkeys(gain["rival"] for gain in result["gains"]):
        cells = []
        for gain in [one for one in result["gains"] if one["rival"] == label]:
            values = [gain["entropy"], gain["rival_entropy"]]
            shown = " / ".join("-" if value is None else f"{value:.2f}" for value in values)
            cells.append(shown + (f": {cell(gain['ratio'])}" if gain["ratio"] else ""))
        rows.append([label, *cells])
    levels = [f"precision {level:g}" for level in LEVELS]
    return markdown(["NegToMe / rival: ratio", *levels], rows)


def table(result: dict[str, Any]) -> str:
    """Return Markdown: the comparison with each rival, and the measures of all conditions."""
    return "\n\n".join(
        [gains_table(result), NOTE, measures_table(result["conditions"]), origin(result)]
    )


def draw(result: dict[str, Any]) -> dict[str, Figure]:
    """Draw the frontiers of NegToMe and all rivals."""
    frontier, grid = figures.panels(10.5, 6.6)
    axes = grid[0][0]
    labels = ["NegToMe", *(rival.label for rival in RIVALS)]
    palette = (BLUE, GREY, *COLOURS)
    series = []
    for number, label in enumerate(labels):
        own = [one for one in result["conditions"] if one["name"].startswith(label)]
        notes = [one["name"].removeprefix(label).strip() for one in own]
        marker = "o" if number < 2 else MARKERS[number - 2]
        series.append(Series(label, own, palette[number], marker, notes))
    figures.frontier(axes, series, best_only=True)
    figures.tidy(
        axes,
        "NegToMe and its rivals: guidance scale, setting (faint: the method itself does better)",
        "precision",
        "attribute entropy, nats",
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8.5)
    return {"frontier": frontier}


STUDY = Study("rivals", "other methods at matched precision", 256, run, table, draw)
