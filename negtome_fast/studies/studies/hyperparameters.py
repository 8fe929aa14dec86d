"""Alpha, threshold, window and guidance scale of `others`, and the preset that a rule chooses.

The images have different seeds from those of the other studies, so that no setting is reported on
the images it was chosen on. The rule looks at settings at the model's own guidance scale that keep
the prompt agreement. It takes the highest attribute entropy x precision, which is usable diversity,
and the weakest of nearly equal settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...config import NegToMeConfig
from ...models import GUIDANCE_SCALE
from ..conditions import Condition
from ..scores import record
from . import figures
from .diversity import TOLERANCE
from .figures import BLUE, COLOURS, GREY, MARKERS, Series
from .study import TUNING_SEED, Study, StudyRun
from .tables import markdown, measures_table, origin

if TYPE_CHECKING:
    from matplotlib.figure import Figure


TIE = 0.05
"""Settings are nearly equal if their score lies within this share of the best."""


@dataclass(frozen=True)
class GridPoint:
    """A setting of the grid; the window begins at pure noise, timestep 1000."""

    scale: float
    alpha: float
    threshold: float
    t_end: float

    @property
    def name(self) -> str:
        """Name of the condition."""
        return (
            f"scale {self.scale:g}, alpha {self.alpha:g}, threshold {self.threshold:g}, "
            f"t >= {self.t_end:g}"
        )

    def condition(self) -> Condition:
        """Return the condition of this setting."""
        config = NegToMeConfig(
            alpha=self.alpha, threshold=self.threshold, t_end=self.t_end, reference="others"
        )
        return Condition(self.name, guidance_scale=self.scale, negtome=config)


#: Settings around (2.5, 0.5, 0.65, 750), with one or two values changed at a time.
GRID = (
    GridPoint(1.0, 0.5, 0.65, 750),
    GridPoint(1.5, 0.5, 0.65, 750),
    GridPoint(2.5, 0.5, 0.65, 750),
    GridPoint(3.5, 0.5, 0.65, 750),
    GridPoint(5.0, 0.5, 0.65, 750),
    GridPoint(2.5, 0.3, 0.65, 750),
    GridPoint(3.5, 0.3, 0.65, 750),
    GridPoint(1.0, 0.9, 0.65, 750),
    GridPoint(1.5, 0.9, 0.65, 750),
    GridPoint(2.5, 0.9, 0.65, 750),
    GridPoint(1.5, 0.9, 0.85, 750),
    GridPoint(2.5, 0.5, 0.65, 850),
    GridPoint(1.5, 0.9, 0.65, 900),
)
OFF = (GUIDANCE_SCALE,)
FEW = (GRID[1], GRID[2])


def run(run: StudyRun) -> dict[str, Any]:
    """Draw the grid and choose a setting."""
    grid = run.sizes.chosen(GRID, FEW)
    wanted = [Condition(f"off {s:g}", guidance_scale=s) for s in OFF]
    wanted += [setting.condition() for setting in grid]
    scores = run.scores(run.samples(wanted, seed=TUNING_SEED))
    records = [record(one) for one in scores.values()]
    return {"conditions": records, "chosen": choose(records, grid)}


def choose(records: Sequence[dict[str, Any]], grid: Sequence[GridPoint]) -> dict[str, Any]:
    """Apply the rule; return the score of every eligible setting, and the chosen one."""
    by_name = {one["name"]: one["measures"] for one in records}
    off = by_name[f"off {GUIDANCE_SCALE:g}"]
    usable = {
        setting: by_name[setting.name]["entropy"][0] * by_name[setting.name]["precision"][0]
        for setting in grid
        if setting.scale == GUIDANCE_SCALE
        and by_name[setting.name]["agreement"][0] >= off["agreement"][0] - TOLERANCE
    }
    best = max(usable.values(), default=0.0)
    near = [setting for setting, value in usable.items() if value >= (1 - TIE) * best]
    chosen = min(near, key=lambda setting: setting.alpha, default=None)
    return {
        "scale": GUIDANCE_SCALE,
        "unguided": round(off["entropy"][0] * off["precision"][0], 4),
        "usable": {setting.name: round(value, 4) for setting, value in usable.items()},
        "setting": None if chosen is None else chosen.name,
    }


def table(result: dict[str, Any]) -> str:
    """Return Markdown: the measures of all settings, and the rule's choice."""
    chosen = result["chosen"]
    rows = [[name, f"{value:.3f}"] for name, value in chosen["usable"].items()]
    rule = (
        f"The rule: at the model's own guidance scale, {chosen['scale']:g}, and with prompt "
        f"agreement within {TOLERANCE:g} of unguided, the most entropy x precision (unguided: "
        f"{chosen['unguided']:.3f}), and of settings within {TIE:.0%} of the best the weakest: "
        f"**{chosen['setting'] or 'none'}**."
    )
    return "\n\n".join(
        [
            measures_table(result["conditions"]),
            rule,
            markdown(["setting", "entropy x precision"], rows),
            origin(result),
        ]
    )


def draw(result: dict[str, Any]) -> dict[str, Figure]:
    """Draw entropy against precision for all settings."""
    frontier, grid = figures.panels(9.5, 6)
    axes = grid[0][0]
    records = result["conditions"]
    off = [one for one in records if one["name"].startswith("off")]
    series = [Series("unguided", off, GREY, "o", [one["name"].split()[1] for one in off])]
    windows: dict[str, list[dict[str, Any]]] = {}
    for one in records:
        if one not in off:
            _, alpha, threshold, window = one["name"].split(", ")
            windows.setdefault(f"{alpha}, {threshold}, {window}", []).append(one)
    palette = (BLUE, *COLOURS)
    for number, (label, own) in enumerate(windows.items()):
        notes = [one["name"].split(",")[0].split()[1] for one in own]
        marker = (*MARKERS, "o")[number % (len(MARKERS) + 1)]
        series.append(Series(label, own, palette[number % len(palette)], marker, notes))
    figures.frontier(axes, series)
    figures.tidy(
        axes,
        "Settings of `others`; numbers are guidance scales",
        "precision",
        "attribute entropy, nats",
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8.5)
    return {"frontier": frontier}


STUDY = Study(
    "hyperparameters",
    "alpha x threshold x window x guidance scale, and the preset",
    256,
    run,
    table,
    draw,
)
