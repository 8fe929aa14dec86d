"""Words for what a guidance did to a batch, on sheets, in records and on the command line.

A run whose steps all lie outside of the window, or whose alpha is 0, is not called guided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GUIDED, UNMOVED, MEASURED, NOT_GUIDED = "guided", "nothing pushed", "measured only", "not guided"

_LABELS = {
    GUIDED: "with NegToMe, same seeds",
    UNMOVED: "with NegToMe, which pushed no token, same seeds",
    MEASURED: "measured only (alpha 0), same seeds",
    NOT_GUIDED: "not guided, same seeds",
}


def outcome_of(summary: Mapping[str, Any], measured_only: bool) -> str:
    """Return `GUIDED`, `UNMOVED`, `MEASURED` or `NOT_GUIDED`.

    Args:
        summary: `GuidanceSummary.to_dict()` of one batch.
        measured_only: True if every alpha is 0.
    """
    if not summary["guided"] or not summary["total"]["tokens"]:
        return NOT_GUIDED
    if measured_only:
        return MEASURED
    return GUIDED if summary["total"]["pushed"] > 0 else UNMOVED


def label(outcomes: Sequence[str]) -> str:
    """Return the heading of a row of images, given the outcomes of their batches."""
    return _LABELS[next((kind for kind in _LABELS if kind in outcomes), NOT_GUIDED)]


def caveat(outcomes: Sequence[str]) -> str:
    """Return what a caption says of batches that were not guided; empty if all were."""
    others = [kind for kind in (NOT_GUIDED, MEASURED, UNMOVED) if kind in outcomes]
    if len(set(outcomes)) < 2:
        return "".join(others)
    return ", ".join(
        f"{kind}: {outcomes.count(kind)} of {len(outcomes)} batches" for kind in others
    )


def told(summary: Mapping[str, Any], outcome: str) -> list[str]:
    """Return lines on one batch: what was guided, and the notes of its summary."""
    total, forwards = summary["total"], f"{summary['guided']} of {summary['forwards']}"
    shares = f"{total['matched']:.1%} of the tokens matched, "
    if outcome == NOT_GUIDED and not summary["guided"]:
        line = f"not guided: {forwards} model forwards lay in the window"
    elif outcome == NOT_GUIDED:
        line = f"not guided: no token was compared with a reference in {forwards} model forwards"
    elif outcome == MEASURED:
        line = f"measured only, since alpha is 0: {forwards} model forwards: {shares}"
    else:
        line = f"guided {forwards} model forwards: {shares}{total['pushed']:.1%} pushed, "
    if outcome != NOT_GUIDED:
        line += f"mean similarity {total['similarity']:.3f}"
    return [line, *summary.get("notes", ())]
