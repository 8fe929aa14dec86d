"""Description of what the guidance did: a sentence, and a plot of every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def told(summary: Mapping[str, Any], alpha: float = 1.0) -> str:
    """Return what the guidance did as a sentence.

    Args:
        summary: `GuidanceSummary.to_dict()`.
        alpha: strength of the guidance; at 0 nothing is pushed.
    """
    total, forwards = summary["total"], summary["forwards"]
    if not summary["guided"]:
        return f"Not guided: none of the {forwards} forwards of the model lies in the window."
    if not total["tokens"]:
        return (
            f"Not guided: in {summary['guided']} of {forwards} forwards of the model lies the "
            "window, and no token was compared with a reference."
        )
    pushed = f"{total['pushed']:.1%} were pushed" if alpha else "none was pushed"
    return (
        f"{'Guided' if alpha else 'Measured only, in'} {summary['guided']} of {forwards} forwards "
        f"of the model: {total['matched']:.1%} of the tokens matched, {pushed}, "
        f"mean similarity {total['similarity']:.3f}."
    )


def plot(summary: Mapping[str, Any]) -> Figure:
    """Plot the shares matched and pushed, and the mean similarity, of each guided block."""
    from matplotlib.figure import Figure  # without pyplot, whose figures all threads share

    rows = summary["rows"]
    figure = Figure(figsize=(9, 0.9 + 0.34 * max(len(rows), 2)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    bars = (("matched", "#9dc0f5", 0.8), ("pushed", "#0b57d0", 0.45))
    for name, colour, height in bars:
        values = [row[name] for row in rows]
        axes.barh(places, values, height, color=colour, label=f"share {name}")
    similarities = [row["similarity"] for row in rows]
    style: dict[str, Any] = {"color": "#d93025", "label": "mean similarity", "clip_on": False}
    axes.plot(similarities, places, "o", **style)
    axes.set_yticks(places, [row["block"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(min([0.0, *similarities]), 1)
    axes.set_title("What the guidance did in each block", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure
