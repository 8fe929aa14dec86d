"""Processes of the suite: each has a time limit and a process group, and all share one log.

A kernel that hangs or faults ends only the process that launched it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._path import ROOT

MOST_LOG_BYTES = 12 * 2**20
"""Size at which the log stops growing, so that it can be sent as one file of at most 16 MiB."""
PRINTED_LINES = 15
"""Last lines of a log that are also printed."""


class Log:
    """The whole outputs of all processes in one file, one after another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.unlink(missing_ok=True)

    def add(self, heading: str, text: str) -> None:
        """Append a text; if it does not fit, keep its beginning and its end."""
        with self._lock:
            used = self.path.stat().st_size if self.path.exists() else 0
            room = max(MOST_LOG_BYTES - used, 4096)
            if len(text.encode()) > room:
                half = room // 8
                text = f"{text[:half]}\n... left out ...\n{text[-half:]}"
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"===== {heading}\n{text.rstrip()}\n\n")


@dataclass
class SuiteRun:
    """One run of the suite.

    Attributes:
        out: folder for results and logs.
        work: folder for temporary files.
        rehearse: run on a CPU with tiny sizes.
        log: the common log.
        warmed: shapes that are compiled already.
        broken: kinds of kernels that failed.
    """

    out: Path
    work: Path
    rehearse: bool
    log: Log
    warmed: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every process of the suite."""
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        return {
            "TRITON_INTERPRET": "1" if self.rehearse else "0",
            "NEGTOME_FAST_TUNED": str(self.out),
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        }


def run_limited(
    command: Sequence[str], output: Path, seconds: float, environment: dict[str, str]
) -> int | None:
    """Run a command and return its exit code; None if it ran longer than `seconds`.

    Its output goes to the file `output`. Its children are in its process group and end with it.
    """
    with output.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            # A process that ended by itself may have left children.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(
    name: str,
    command: Sequence[str],
    setting: SuiteRun,
    seconds: float,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run a stage, or a part of one, as one process.

    Returns:
        exit_code, None if it was ended; cut_short; took_seconds; and log, the last lines.
    """
    output = setting.work / f"{name.replace(' ', '-').replace('/', '-')}.log"
    started = time.monotonic()
    code = run_limited(command, output, seconds, setting.environment | (environment or {}))
    took = round(time.monotonic() - started, 1)
    text = output.read_text(errors="replace") if output.exists() else ""
    ended = f"ended after {took} s" if code is None else f"exit code {code} after {took} s"
    setting.log.add(f"{name}: {ended}", text)
    lines = text.splitlines()[-PRINTED_LINES:]
    return {"exit_code": code, "cut_short": code is None, "took_seconds": took, "log": lines}


def together(calls: Sequence[Any], at_once: int) -> list[Any]:
    """Results of calls without arguments; at most `at_once` run at the same time."""
    with ThreadPoolExecutor(max_workers=max(1, min(at_once, len(calls) or 1))) as pool:
        return list(pool.map(lambda call: call(), calls))


def read_json(path: Path) -> Any:
    """Content of a file that a process wrote, or None if there is none or half of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
