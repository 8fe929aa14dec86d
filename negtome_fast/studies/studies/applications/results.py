"""Table and figures of the study, all from its file of results alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ....models.avatars import STYLES
from .. import figures as plots
from ..figures import BLUE, COLOURS, GREY
from ..tables import cell, markdown, origin, signed
from .common import picture_avatar
from .interpolate import TAKEN, alpha_of
from .sharpen import BLUR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _table(records: Sequence[dict[str, Any]], names: Sequence[str] = ()) -> str:
    """Return Markdown with a row per condition and a column per measure.

    A cell has the value and its paired difference to unguided images.
    """
    names = names or list(records[0]["measured"])
    excluded = "style" in records[0]
    rows = []
    for one in records:
        row = [one["style"], one["name"]] if excluded else [one["name"]]
        for name in names:
            digits = 1 if name in ("contrast", "latent L2") else 2
            digits = 3 if "cosine" in name else digits
            own = one["measured"][name]
            if "differences" not in one:
                row.append(cell(own, digits))
                continue
            *change, verdict = one["differences"][name]
            row.append(f"{own[0]:.{digits}f}; {signed(change, digits)} {verdict}")
        rows.append(row)
    return markdown([*(["excluded"] if excluded else []), "condition", *names], rows)


def _by_alpha(result: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(result["interpolate"], key=lambda one: alpha_of(one["name"]))


def table(result: dict[str, Any]) -> str:
    """Return Markdown with the tables of all applications."""
    parts = [
        "Each cell has the value, its paired difference to unguided with an interval, and a "
        "verdict. Unguided images have the value alone.",
        "**Excluding a style** from prompts that name none, mean over the styles, each excluded in "
        "turn:",
        _table(result["style"]["mean"]),
    ]
    less = "; ".join(
        f"{name} {signed(change)}, {verdict}"
        for name, (*change, verdict) in result["style"]["NegToMe less negative prompt"].items()
    )
    parts += [f"NegToMe less negative prompt: {less}.", "Style by style:"]
    parts.append(_table(result["style"]["styles"], ("style shown", "prompt kept")))
    for part in result["sharpen"]:
        parts += [
            f"**Away from what is blurred** by {BLUR:g} pixels, guidance scale "
            f"{part['scale']:g}; the blurred copies have a contrast of "
            f"{part['blurred_contrast']:.1f}, balanced real images {result['real_contrast']:.1f}:",
            _table(part["conditions"]),
        ]
    avatar = picture_avatar(next(iter(STYLES)))
    parts += [
        f"**Toward (alpha below 0) or away from** a picture of the prompt's style with "
        f"{avatar.skin} skin and {avatar.hair_color} hair in a {avatar.hair_shape}:",
        _table(_by_alpha(result)),
        origin(result),
    ]
    return "\n\n".join(parts)


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Draw a figure for each application."""
    return {
        "exclusion": _exclusion(result["style"]["styles"]),
        "sharpening": _sharpening(result["sharpen"]),
        "likeness": _likeness(_by_alpha(result)),
    }


def _exclusion(rows: Sequence[dict[str, Any]]) -> Figure:
    figure, grid = plots.panels(12, 4.2, 2)
    styles = list(dict.fromkeys(row["style"] for row in rows))
    ways = list(dict.fromkeys(row["name"] for row in rows))
    for axes, measure, title in zip(
        grid[0],
        ("style shown", "prompt kept"),
        ("Share of images in the excluded style", "Share that keeps the prompt"),
        strict=True,
    ):
        found = {
            way: [row["measured"][measure] for row in rows if row["name"] == way] for way in ways
        }
        plots.bars(axes, styles, found)
        plots.tidy(axes, title, "excluded style", "")
        axes.set_ylim(0, 1.05)
    handles = grid[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(ways), frameon=False)
    return figure


def _sharpening(parts: Sequence[dict[str, Any]]) -> Figure:
    figure, grid = plots.panels(12, 3.6, 3)
    for axes, measure, title in zip(
        grid[0],
        ("contrast", "cosine with the nearest real image", "precision"),
        ("Contrast, 256ths", "Cosine, nearest real image", "Precision"),
        strict=True,
    ):
        _differences(axes, parts, measure)
        plots.tidy(axes, title, "difference to unguided", "")
    for axes in grid[0][1:]:
        axes.set_yticklabels([])
    return figure


def _likeness(records: Sequence[dict[str, Any]]) -> Figure:
    figure, grid = plots.panels(13, 3.8, 3)
    at = [alpha_of(one["name"]) for one in records]
    for axes, names, title in zip(
        grid[0],
        (("latent L2",), ("cosine", "precision", "prompt kept"), TAKEN),
        ("Distance from the picture, latent L2", "Likeness and quality", "Attributes taken"),
        strict=True,
    ):
        for name, colour in zip(names, (BLUE, GREY, *COLOURS), strict=False):
            values = [one["measured"][name] for one in records]
            axes.plot(at, [v[0] for v in values], "o-", color=colour, label=name)
            axes.fill_between(
                at, [v[1] for v in values], [v[2] for v in values], color=colour, alpha=0.15
            )
        plots.tidy(axes, title, "alpha: below 0 toward, above 0 away", "")
        axes.set_xticks(at)
        if len(names) > 1:
            axes.set_ylim(-0.03, 1.05)
            axes.legend(frameon=False, fontsize=8)
    return figure


def _differences(axes: Axes, parts: Sequence[dict[str, Any]], measure: str) -> None:
    """Plot a row per condition: its paired difference with interval; a line marks no change."""
    labels: list[str] = []
    for part, colour in zip(parts, (BLUE, COLOURS[0]), strict=False):
        for one in part["conditions"]:
            if "differences" not in one:
                continue
            values = one["differences"][measure]
            axes.errorbar(
                [values[0]], [len(labels)], xerr=plots.bar_ends([values]), fmt="o", color=colour
            )
            labels.append(f"{one['name']}, scale {part['scale']:g}".replace(", alpha", ",\nalpha"))
    axes.axvline(0, color="#555555", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
