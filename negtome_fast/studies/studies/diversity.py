"""Diversity over guidance scales: unguided, `first`, `others`, and the authors' order of matching.

The study of hyperparameters chose the settings on other seeds. The question: at the precision and
prompt agreement of an unguided scale, how many times its attribute entropy does guidance reach?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import NegToMeConfig
from ...generation import APPLICATIONS
from ...models.avatars import ATTRIBUTES, OPEN_ATTRIBUTES, STYLES, prompt_for
from ..conditions import Condition, Group
from ..frontier import compared, matched
from ..sampler import balanced_avatars
from ..scores import Scores, corrected, record
from . import figures
from .figures import BLUE, COLOURS, GREY, Series
from .study import SEED, Study, StudyRun
from .tables import cell, markdown, measures_table, origin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = (1.0, 1.5, 2.0, 2.5, 3.5, 5.0)
FEW_SCALES = (1.0, 2.5)
SHOWN = 2.5
"""Guidance scale of the sheet of samples."""

NAMED_SEED = 90_000
LEVELS = {"precision": (0.3, 0.4, 0.5, 0.6), "precision_decoded": (0.6, 0.7, 0.75, 0.8)}
TOLERANCE = 0.01
"""Prompt agreement that a guided condition may lose against unguided."""

#: Entropy of the balanced world, in nats: the upper bound.
CEILING = sum(math.log(len(ATTRIBUTES[name])) for name in OPEN_ATTRIBUTES) / len(OPEN_ATTRIBUTES)


def preset(**overrides: Any) -> NegToMeConfig:
    """Return the package's settings for diversity on the embedded model."""
    application = APPLICATIONS["diversity"]
    return NegToMeConfig(**{**application.guidance, **application.embedded, **overrides})


@dataclass(frozen=True)
class ScaleSweep:
    """A setting over guidance scales; `changed` None is unguided."""

    label: str
    changed: dict[str, Any] | None
    scales: Sequence[float]

    def conditions(self, name: str, scales: Sequence[float]) -> list[Condition]:
        """Return the sweep's conditions at the given `scales`, where it has them."""
        config = None if self.changed is None else preset(**self.changed)
        return [
            Condition(f"{name} {scale:g}", guidance_scale=scale, negtome=config)
            for scale in self.scales
            if scale in scales
        ]


METHODS: dict[str, ScaleSweep] = {
    "off": ScaleSweep("unguided", None, SCALES),
    "others": ScaleSweep("NegToMe, others", {}, (1.0, 1.5, 2.5, 5.0)),
    "alpha-0.3": ScaleSweep("NegToMe, others, alpha 0.3", {"alpha": 0.3}, (1.0, 1.5, 2.5)),
    "alpha-0.15": ScaleSweep("NegToMe, others, alpha 0.15", {"alpha": 0.15}, (1.0, 1.5, 2.5)),
    "first": ScaleSweep("NegToMe, first", {"reference": "first"}, (1.0, 2.5)),
    "official": ScaleSweep(
        "NegToMe, first, authors' order",
        {"reference": "first", "matching": "official"},
        (1.0, 2.5),
    ),
}
FRONTIER = ("others", "alpha-0.3", "alpha-0.15")
"""Methods whose conditions, with the unguided ones (alpha 0), make NegToMe's frontier."""


def conditions(run: StudyRun) -> list[Condition]:
    """Return the conditions of all methods."""
    scales = run.sizes.chosen(SCALES, FEW_SCALES)
    return [one for name, method in METHODS.items() for one in method.conditions(name, scales)]


def run(run: StudyRun) -> dict[str, Any]:
    """Draw all conditions, and compare the frontiers."""
    drawn = run.samples(conditions(run), seed=SEED)
    scores = run.scores(drawn)
    # Unguided is alpha 0, so the frontier of the method has these points as well.
    frontier = [one for name, one in scores.items() if name.split()[0] in ("off", *FRONTIER)]
    off = [one for name, one in scores.items() if name.startswith("off ")]
    gains = []
    for name, base in scores.items():
        if not name.startswith("off "):
            continue
        agreement = float(base.hits.double().mean())
        points = [p for p in frontier if float(p.hits.double().mean()) >= agreement - TOLERANCE]
        gains += [gain(base, points, quality) for quality in ("precision", "precision_decoded")]
    run.sheet(
        "samples",
        f"Guidance scale {SHOWN:g}: unguided and guided from the same seeds",
        {METHODS[name].label: drawn[f"{name} {SHOWN:g}"] for name in ("off", "others", "first")},
    )
    return {
        "ceiling": round(CEILING, 4),
        "preset": preset().to_dict(),
        "conditions": [
            record(one, scores.get("off " + name.split()[1])) for name, one in scores.items()
        ],
        "named": named(run),
        "gains": gains,
        "frontiers": [
            level_of(frontier, off, level, quality)
            for quality, levels in LEVELS.items()
            for level in levels
        ],
    }


def gain(base: Scores, points: Sequence[Scores], quality: str) -> dict[str, Any]:
    """Return the frontier of `points` at the quality of `base`, for the result file."""
    found = matched(base, points, quality)
    return {
        "base": base.samples.condition.name,
        "quality": quality,
        "level": round(found.level, 4),
        "base_entropy": round(found.base, 4),
        "entropy": None if math.isnan(found.method) else round(found.method, 4),
        "ratio": corrected(found.ratio),
    }


def level_of(
    points: Sequence[Scores], off: Sequence[Scores], level: float, quality: str
) -> dict[str, Any]:
    """Return both frontiers at one level; the unguided one may mix all guidance scales."""
    found = compared(points, off, level, quality)
    return {
        "quality": quality,
        "level": level,
        "off_entropy": None if math.isnan(found.rival) else round(found.rival, 4),
        "entropy": None if math.isnan(found.method) else round(found.method, 4),
        "ratio": corrected(found.ratio),
    }


def named(run: StudyRun) -> dict[str, Any]:
    """Draw unguided images from prompts that name balanced attributes: the model's own limit.

    Their entropy is that of the prompts. Their precision shows how well the model draws attributes
    outside its majority.
    """
    each = run.sizes.images // len(STYLES)
    groups, styles = [], []
    for number, avatar in enumerate(balanced_avatars(each * len(STYLES), NAMED_SEED)):
        prompt = prompt_for(avatar.style, avatar.skin, avatar.hair_color, avatar.hair_shape)
        groups.append(Group(prompt, (NAMED_SEED + number,)))
        styles.append(prompt_for(avatar.style))
    samples = run.drawn([Condition("named")], groups)["named"]
    agreement = run.scores({"named": samples})["named"].hits.double().mean()
    # As in the other conditions, entropy is taken over the images of a style. The bootstrap draws
    # pairs, so that no draw has a single image.
    pairs = np.arange(len(samples)) // len(STYLES) // 2
    regrouped = replace(samples, prompts=tuple(styles), groups=pairs)
    entry = record(run.scores({"named": regrouped})["named"])
    return {**entry, "attributes_right": round(float(agreement), 4)}


def gains_table(result: dict[str, Any], quality: str = "precision") -> str:
    """Return Markdown: the guided frontier at the precision of each unguided condition."""
    rows = []
    for one in result["gains"]:
        if one["quality"] != quality:
            continue
        reached = one["entropy"] is not None
        rows.append(
            [
                one["base"].replace("off ", "scale "),
                f"{one['level']:.3f}",
                f"{one['base_entropy']:.2f}",
                f"{one['entropy']:.2f}" if reached else "not reached",
                cell(one["ratio"]) if one["ratio"] else "-",
            ]
        )
    header = [
        "unguided at",
        "its precision",
        "its entropy",
        "guided, at that precision",
        "ratio",
    ]
    return markdown(header, rows)


def frontiers_table(result: dict[str, Any], quality: str = "precision") -> str:
    """Return Markdown: the unguided and the guided frontier at each level of precision."""
    rows = [
        [
            f"{one['level']:g}",
            *("-" if one[key] is None else f"{one[key]:.2f}" for key in ("off_entropy", "entropy")),
            cell(one["ratio"]) if one["ratio"] else "-",
        ]
        for one in result["frontiers"]
        if one["quality"] == quality
    ]
    return markdown(["precision at least", "unguided, all scales", "guided", "ratio"], rows)


def table(result: dict[str, Any]) -> str:
    """Return Markdown: frontiers, gains, and the measures of all conditions."""
    own = result["named"]
    measured = own["measures"]
    note = (
        "Guided: the frontier of `others` over guidance scales and alpha at prompt agreement "
        f"within {TOLERANCE:g} of unguided, alpha 0 included. Ratios are without the bias that few "
        "images give to entropies; measures.md says how often such intervals hold the truth, by "
        "the number of images. "
        f"Entropy of the balanced world: {result['ceiling']:.2f} nats. Where prompts name balanced "
        f"attributes, the unguided model has entropy {measured['entropy'][0]:.2f} at a precision "
        f"of {measured['precision'][0]:.2f} ({measured['precision_decoded'][0]:.2f} against real "
        f"images after the VAE), with all attributes right in {own['attributes_right']:.0%}."
    )
    return "\n\n".join(
        [
            "Frontier against frontier, against real images:",
            frontiers_table(result),
            "The same against real images after the model's VAE:",
            frontiers_table(result, "precision_decoded"),
            "At the precision of each unguided scale, against this scale alone:",
            gains_table(result),
            note,
            measures_table(result["conditions"]),
            origin(result),
        ]
    )


def _series(result: dict[str, Any]) -> list[Series]:
    colours = (GREY, BLUE, "#5e9bff", "#a9cbff", COLOURS[0], COLOURS[2])
    markers = ("o", "o", "v", "^", "s", "D")
    found = []
    for (name, method), colour, marker in zip(METHODS.items(), colours, markers, strict=True):
        own = [c for c in result["conditions"] if c["name"].split()[0] == name]
        notes = [c["name"].split()[1] for c in own]
        found.append(Series(method.label, own, colour, marker, notes))
    return found


def draw(result: dict[str, Any]) -> dict[str, Figure]:
    """Draw the frontiers, and the measures over guidance scales."""
    series = _series(result)
    own = Series("unguided, prompts name balanced attributes", [result["named"]], COLOURS[3], "X")
    frontier, grid = figures.panels(13, 5.4, 2)
    for axes, quality, title in zip(
        grid[0],
        ("precision", "precision_decoded"),
        ("Diversity against quality", "The same, real images after the VAE"),
        strict=True,
    ):
        figures.frontier(axes, [*series, own], x=quality)
        axes.axhline(result["ceiling"], color="#999999", linewidth=0.8, linestyle=":")
        figures.tidy(axes, title, "precision", "attribute entropy, nats")
        axes.set_ylim(bottom=0)
    grid[0][0].legend(frameon=False, fontsize=8.5)

    sweeps, grid = figures.panels(12, 3.6, 3)
    for axes, measure, label in zip(
        grid[0],
        ("entropy", "cosine", "precision"),
        ("attribute entropy, nats", "pairwise cosine (lower: more diverse)", "precision"),
        strict=True,
    ):
        for one in series[:2]:
            at = [float(c["name"].split()[1]) for c in one.conditions]
            figures.sweep(axes, [one], at, measure)
        figures.tidy(axes, label, "guidance scale", "")
    grid[0][0].legend(frameon=False, fontsize=8)
    return {"frontier": frontier, "sweep": sweeps}


STUDY = Study(
    "diversity",
    "guidance scale x reference, and the ratio at matched precision",
    256,
    run,
    table,
    draw,
)
