"""Files of results in bench/results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from negtome_fast.files import write_atomically

from ._path import ROOT

SCHEMA = 2
FOLDER = ROOT / "bench" / "results"


def save(path: Path, result: dict[str, Any]) -> None:
    """Replace the file at once, so that a run that is killed leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def load(path: Path) -> dict[str, Any]:
    """Read a result of `python -m bench` or of the GPU suite.

    Raises:
        ValueError: the file is something else.
        OSError: the file cannot be read.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(result, dict) or not {"versions", "cpu"} <= result.keys():
        raise ValueError(f"{path} is not a result of the benchmarks")
    return result


def micro(result: dict[str, Any]) -> dict[str, Any] | None:
    """The operator's benchmark: the result itself, or the stages of the GPU suite together."""
    if "cases" in result:
        return result
    found = [
        stage["result"]
        for stage in result.get("stages", {}).values()
        if "cases" in (stage.get("result") or {})
    ]
    if not found:
        return None
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for case in (case for part in found for case in part["cases"]):
        before = latest.get(case_key(case), {})
        if "times" not in case and "times" in before:
            continue
        # A later stage may measure a shape again, tuned or against other rivals: the later counts.
        merged = before | case
        for what in ("times", "extra_bytes"):
            if what in before:
                merged[what] = before[what] | case.get(what, {})
        latest[case_key(case)] = merged
    return found[-1] | {"cases": list(latest.values())}


def end_to_end(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The models that were measured end to end."""
    if "models" in result:
        return list(result["models"])
    return [
        model
        for stage in result.get("stages", {}).values()
        for model in (stage.get("result") or {}).get("models", ())
    ]


def case_key(case: dict[str, Any]) -> tuple[str, str]:
    """Shape and dtype, which identify a case in two files."""
    return case["shape"], case["dtype"]


def measured(result: dict[str, Any], series: str) -> Iterator[dict[str, Any]]:
    """The cases of a series that have figures."""
    for case in result["cases"]:
        if case.get("series", "shapes") == series and not {"skipped", "wrong"} & case.keys():
            yield case
