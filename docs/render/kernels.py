"""Tables of docs/kernels.md: what the compilers make of the kernels."""

from __future__ import annotations

import json
from typing import Any

from negtome_fast.tuner import candidates, compile_report


def compiled(target: str, result: dict[str, Any]) -> str:
    """All shipped configurations of a target, by the installed Triton."""
    return compile_report.markdown(row for row in result["rows"] if row["target"] == target)


def other_compiler(target: str, result: dict[str, Any]) -> str:
    """The configurations of a target that the other Triton compiles differently."""
    ours, theirs = (
        [row for row in result[which] if row["target"] == target] for which in ("rows", "others")
    )
    lines, others = ([*map(compile_report.cells, rows)] for rows in (ours, theirs))
    versions = f"{ours[0]['triton']} -> {theirs[0]['triton']}"
    return compile_report.comparison(lines, others, versions)


def listed_candidates(target: str) -> str:
    """The candidates of the tuner for a target, and how many of them compile well."""
    path = candidates.FOLDER / f"{target}.json"
    entries = json.loads(path.read_text(encoding="utf-8"))["candidates"]
    versions = {name for entry in entries for name in entry if name[0].isdigit()}
    return candidates.summary({v: candidates.listed(target, v, path) for v in versions})
