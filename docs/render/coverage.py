"""The table of docs/measures.md: how often the intervals of the studies hold the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One row for each simulation of `negtome_fast.studies.studies.coverage`."""
    lines = [
        "| groups a prompt | images | images of a group | mean estimate | mean corrected "
        "| ratio covered | wholly above | difference covered |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['groups']} | {r['images']} | {'spread' if r['spread'] else 'independent'} "
        f"| {r['estimate']:.2f} | {r['corrected']:.2f} | {r['covered']:.3f} | {r['above']:.3f} "
        f"| {r['difference_covered']:.3f} |"
        for r in rows
    ]
    first = rows[0]
    lines += ["", f"True ratio {first['truth']:.2f}; {first['runs']} simulated studies a row."]
    return "\n".join(lines)
