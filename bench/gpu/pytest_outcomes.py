"""pytest plugin (`-p bench.gpu.pytest_outcomes`): writes each outcome down as it comes.

Each outcome is a line of JSON, so that a run that is cut short keeps its outcomes. Loaded first,
the plugin also makes the project importable where it is not installed, because importing the
package `bench` does. After a failed test it asks whether the GPU still answers. After a device
fault nothing else can run in the same process, so the process ends, and pytest-xdist starts another
worker for the tests that are left.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

FILE_VARIABLE = "NEGTOME_FAST_OUTCOMES"
HALF = 6000
"""Characters kept at each end of a long traceback."""
LOST = 70
"""Exit code of a process that lost the device."""


def _write(test: str, outcome: str, why: str) -> None:
    path = os.environ.get(FILE_VARIABLE)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"test": test, "outcome": outcome, "why": why}) + "\n")


def _reason(report: Any) -> str:
    """The traceback, or the beginning and the end of a very long one."""
    text = str(report.longrepr).strip()
    return text if len(text) <= 2 * HALF else f"{text[:HALF]}\n...\n{text[-HALF:]}"


def device_lost() -> bool:
    """Return True if this process used the GPU and a fault made it unusable."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


_failed: list[str] = []


def pytest_runtest_logfinish(nodeid: str) -> None:
    if _failed and device_lost():
        _write(nodeid, "failed", "the device was lost to this process, which ended")
        os._exit(LOST)
    _failed.clear()


def pytest_runtest_logreport(report: Any) -> None:
    if report.outcome == "failed":
        _failed.append(report.nodeid)
    if report.when == "call" or report.outcome != "passed":
        why = _reason(report) if report.outcome == "failed" else ""
        _write(report.nodeid, report.outcome, why)


def pytest_collectreport(report: Any) -> None:
    if report.outcome != "passed":
        _write(report.nodeid, report.outcome, _reason(report))
