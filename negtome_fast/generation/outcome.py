"""Words for what a guidance did to a batch, on sheets and on the command line.

They follow the verdict of the summary: a run whose steps all lie outside of the window, or whose
alpha is 0, is not called guided.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

GUIDED = "guided"

_LABELS = {
    GUIDED: "with NegToMe, same seeds",
    "measured only": "measured only (alpha 0), same seeds",
    "not guided": "not guided, same seeds",
}
"""Headings by verdict; a row of several batches has the first that one of them has."""


def label(verdicts: Collection[str]) -> str:
    """Return the heading of a row of images, given the verdicts on their batches."""
    return next(heading for verdict, heading in _LABELS.items() if verdict in verdicts)


def caveat(verdicts: Sequence[str]) -> str:
    """Return what a caption says of batches that were not guided; empty if all were."""
    others = {v: verdicts.count(v) for v in _LABELS if v != GUIDED and v in verdicts}
    if len(set(verdicts)) == 1:
        return "".join(others)
    return ", ".join(f"{v}: {n} of {len(verdicts)} batches" for v, n in others.items())


def told(summary: Mapping[str, Any], shown: Collection[str] = ()) -> list[str]:
    """Return lines on one batch: what became of it, and the notes that were not shown yet.

    Args:
        summary: `GuidanceSummary.to_dict()`.
        shown: warnings that the user has seen.
    """
    total, line = summary["total"], str(summary["sentence"])
    matched, similarity = f"{total['matched']:.1%} of the tokens matched", total["similarity"]
    if summary["verdict"] == GUIDED:
        line = (
            f"guided {summary['guided']} of {summary['forwards']} model forwards: {matched}, "
            f"{total['pushed']:.1%} pushed, mean similarity {similarity:.3f}"
        )
    elif summary["verdict"] == "measured only":
        line += f": {matched}, mean similarity {similarity:.3f}"
    return [line, *(note for note in summary["notes"] if note not in shown)]
