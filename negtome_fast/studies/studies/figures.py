"""Plots of the studies: frontiers, sweeps and bars, with 95% intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..frontier import outline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Unguided is grey, NegToMe blue; rivals take the others in turn.
GREY, BLUE = "#6b6b6b", "#0b57d0"
COLOURS = ("#d1495b", "#2e8b57", "#edae49", "#7b4fb5", "#00868b", "#b5651d", "#c2185b")
MARKERS = ("s", "^", "D", "v", "P", "X", "<")


@dataclass(frozen=True)
class Series:
    """Conditions of a method: their records in the order of the sweep, and how to draw them."""

    label: str
    conditions: Sequence[dict[str, Any]]
    colour: str
    marker: str = "o"
    notes: Sequence[str] = ()


def panels(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    """Return a figure and its axes, (rows, columns).

    Raises:
        ImportError: matplotlib is missing; names the extra to install.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ImportError("figures need matplotlib: pip install 'negtome-fast[eval]'") from None
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def tidy(axes: Axes, title: str, x: str, y: str) -> None:
    """Set title and labels, and the common style."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


def frontier(
    axes: Axes,
    series: Sequence[Series],
    *,
    x: str = "precision",
    y: str = "entropy",
    line: bool = True,
    best_only: bool = False,
) -> None:
    """Plot a point with intervals per condition, and the frontier of each method as a line.

    Args:
        axes: where to plot.
        series: the methods.
        x: measure on the horizontal axis.
        y: measure on the vertical axis.
        line: draw the frontiers.
        best_only: draw a condition that another of its series beats in both measures as a faint
            point, without intervals and note.
    """
    for one in series:
        points = [(c["measures"][x], c["measures"][y]) for c in one.conditions]
        notes = list(one.notes)
        if best_only:
            beaten = [_beaten(p, points) for p in points]
            faint = [p for p, hidden in zip(points, beaten, strict=True) if hidden]
            axes.scatter(
                [p[0][0] for p in faint],
                [p[1][0] for p in faint],
                color=one.colour,
                marker=one.marker,
                s=16,
                alpha=0.35,
                linewidths=0,
            )
            notes = [note for note, hidden in zip(notes, beaten, strict=False) if not hidden]
            points = [p for p, hidden in zip(points, beaten, strict=True) if not hidden]
        if not points:
            continue
        across, up = ([p[i][0] for p in points] for i in (0, 1))
        axes.errorbar(
            across,
            up,
            xerr=bar_ends([p[0] for p in points]),
            yerr=bar_ends([p[1] for p in points]),
            fmt=one.marker,
            color=one.colour,
            markersize=6,
            elinewidth=0.8,
            alpha=0.9,
            label=one.label,
        )
        if line and len(points) > 1:
            drawn = outline(list(zip(across, up, strict=True)))
            axes.plot(*zip(*drawn, strict=True), color=one.colour, linewidth=1.6, alpha=0.6)
        for note, a, b in zip(notes, across, up, strict=False):
            axes.annotate(
                note, (a, b), textcoords="offset points", xytext=(6, 5), fontsize=7.5,
                color=one.colour,
            )  # fmt: skip


def _beaten(point: Any, points: Sequence[Any]) -> bool:
    """Return True if another point has higher estimates of both measures."""
    return any(all(a[0] > b[0] for a, b in zip(one, point, strict=True)) for one in points)


def sweep(axes: Axes, series: Sequence[Series], at: Sequence[float], measure: str) -> None:
    """Plot a measure over the values `at` of a sweep, with a band for its interval."""
    for one in series:
        values = [c["measures"][measure] for c in one.conditions]
        places = at[: len(values)]
        axes.plot(
            places, [v[0] for v in values], marker=one.marker, color=one.colour, label=one.label
        )
        axes.fill_between(
            places, [v[1] for v in values], [v[2] for v in values], color=one.colour, alpha=0.15
        )


def bars(
    axes: Axes, labels: Sequence[str], values: Mapping[str, Sequence[Sequence[float]]]
) -> None:
    """Plot bars with intervals: a group per label, a colour per name in `values`."""
    width = 0.8 / len(values)
    palette = (GREY, BLUE, *COLOURS)
    for number, (name, column) in enumerate(values.items()):
        places = [row + (number - (len(values) - 1) / 2) * width for row in range(len(labels))]
        axes.bar(
            places, [v[0] for v in column], width, color=palette[number % len(palette)], label=name,
            yerr=bar_ends(column), error_kw={"elinewidth": 0.9},
        )  # fmt: skip
    axes.set_xticks(range(len(labels)), labels)


def bar_ends(values: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return distances below and above the estimates for matplotlib; never negative."""
    return [
        [max(0.0, v[0] - v[1]) for v in values],
        [max(0.0, v[2] - v[0]) for v in values],
    ]
