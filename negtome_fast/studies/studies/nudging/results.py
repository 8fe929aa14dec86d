"""Table, goal and figures of the study, all from its file of results alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import figures as plots
from ..figures import BLUE, COLOURS, GREY
from ..tables import cell, markdown, signed
from .subjects import PLAIN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = {"reseed": GREY, "negtome": COLOURS[2], "nudge": BLUE, "both": COLOURS[1]}
"""Colours of the methods in the figure of distances."""


def table(result: dict[str, Any]) -> str:
    """Return Markdown with a row for each model and method."""
    rows = []
    for subject in result["subjects"]:
        for one in subject["methods"]:
            measures = one["measures"]
            label = "plain" if one["name"] == PLAIN else result["methods"][one["name"]]
            compared = one.get("against_reseeding")
            rows.append(
                [
                    f"{subject['label']} ({subject['images']})",
                    label,
                    _percent(measures["memorised"]),
                    _percent(measures["agreement"]),
                    cell(measures["frechet"], 1),
                    signed(compared["frechet"], 1) if compared else "-",
                    f"{measures['cosine'][0]:.2f}",
                    f"{measures['pixels'][0]:.3f}",
                    f"{measures['latents'][0]:.1f}",
                    f"{measures['nearest_desired'][0]:.3f}",
                    f"{measures['generations'][0]:.2f}",
                ]
            )
    header = [
        "memorised by (images)",
        "method",
        "still memorised",
        "prompt kept",
        "Frechet distance",
        "less re-seeding's",
        "feature cosine to the memorised image",
        "RMS of pixels",
        "L2 of latents",
        "RMS to the nearest desired point",
        "generations an image",
    ]
    first = result["subjects"][0]
    note = (
        f"{first['images'] // len(first['prompts'])} images of each prompt, "
        f"{result['sizes']['steps']} steps, at most {result['max_attempts']} generations of an "
        "image, the plain one included; 95% intervals in brackets, differences paired by seed. "
        f"torch {result['versions']['torch']}, {result['date'][:10]}. Made by "
        f"`{result['command']}`."
    )
    return markdown(header, rows) + "\n\n" + note


def _percent(values: Sequence[float]) -> str:
    return f"{values[0]:.1%} [{max(0.0, values[1]):.1%}, {min(1.0, values[2]):.1%}]"


def goal(result: dict[str, Any], method: str = "nudge") -> dict[str, dict[str, str]]:
    """Return, for each model, which parts of the goal a method reaches.

    The answers are yes, no, or no change seen.
    """
    reached = {}
    for subject in result["subjects"]:
        one = next(m for m in subject["methods"] if m["name"] == method)
        compared = one["against_reseeding"]
        estimate, low, high = compared["frechet"]
        quality = "yes" if high < 0 else "no" if low > 0 else "no change seen"
        reached[subject["label"]] = {
            "nothing memorised is left": _yes(one["measures"]["memorised"][0] == 0),
            "Frechet distance no worse than re-seeding's": f"{quality} ({estimate:+.0f})",
            "prompt agreement within 1 point of it": _yes(compared["agreement"][0] >= -0.01),
        }
    return reached


def _yes(met: bool) -> str:
    return "yes" if met else "no"


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Draw the paper's figures 4 and 5 for these models: distances, and arrows in feature space."""
    count = len(result["subjects"])
    distances, grid = plots.panels(6 * count, 3.8, columns=count)
    for axes, subject in zip(grid[0], result["subjects"], strict=True):
        pixels = subject["pixels"]
        edges = np.linspace(0, max(max(values) for values in pixels.values()) * 1.02, 26)
        axes.hist(pixels[PLAIN], edges, color="#d9d9d9", label="plain")
        for name, colour in _SHOWN.items():
            label = result["methods"][name]
            axes.hist(
                pixels[name], edges, histtype="step", color=colour, linewidth=1.6, label=label
            )
        axes.axvline(result["pixels_threshold"], color="black", linewidth=0.9, linestyle="--")
        title = f"{subject['label']}: distance to the memorised image"
        plots.tidy(axes, title, "root mean square difference of pixels", "images")
        axes.legend(frameon=False, fontsize=8)
    arrows, grid = plots.panels(6 * count, 4.6, columns=count)
    for axes, subject in zip(grid[0], result["subjects"], strict=True):
        shown = subject["projection"]
        axes.scatter(*_columns(shown["real"]), color="#d0d0d0", s=12, label="ordinary avatars")
        for before, after in zip(shown[PLAIN], shown["nudge"], strict=True):
            if before != after:
                axes.annotate(
                    "",
                    after,
                    before,
                    arrowprops={"arrowstyle": "->", "color": BLUE, "alpha": 0.45, "lw": 0.8},
                )
        axes.scatter(*_columns(shown[PLAIN]), color=GREY, s=14, label="plain")
        axes.scatter(*_columns(shown["nudge"]), color=BLUE, s=14, label="nudged")
        axes.scatter(
            *_columns(shown["targets"]), color=COLOURS[0], marker="*", s=110, label="memorised"
        )
        share = f"{shown['explained']:.0%} of the variance"
        plots.tidy(axes, f"{subject['label']}: features", "first component", "second component")
        axes.legend(frameon=False, fontsize=8, title=share, title_fontsize=8)
    return {"distances": distances, "arrows": arrows}


def _columns(points: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[point[axis] for point in points] for axis in (0, 1)]
