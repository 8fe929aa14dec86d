"""pytest plugin (`-p bench.pytest_outcomes`): writes each outcome down as it comes, as JSON lines.

A run that is cut short so leaves what it has. Loaded first, it also makes the project importable
where it is not installed, because importing the package `bench` does.
"""

from __future__ import annotations

import json
import os
from typing import Any

FILE_VARIABLE = "NEGTOME_FAST_OUTCOMES"


def _write(test: str, outcome: str, why: str) -> None:
    path = os.environ.get(FILE_VARIABLE)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"test": test, "outcome": outcome, "why": why}) + "\n")


def _reason(report: Any) -> str:
    lines = str(report.longrepr).strip().splitlines()
    return lines[-1][:400] if lines else ""


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        why = _reason(report) if report.outcome == "failed" else ""
        _write(report.nodeid, report.outcome, why)


def pytest_collectreport(report: Any) -> None:
    if report.outcome != "passed":
        _write(report.nodeid, report.outcome, _reason(report))
