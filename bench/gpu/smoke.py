"""The stages of `smoke`: every kernel runs and is right, and the main shapes are timed."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..compared import predictions
from ..timing.launches import KINDS
from .kinds import file_of
from .processes import SuiteRun, read_json, run, together
from .suite import Stage

SHAPES = tuple(one["shape"] for one in predictions.load())
"""Main shapes, most important first."""
REHEARSED_SHAPES = ("3x40x32", "3x40x32,others")
PROFILERS = ("ncu", "/usr/local/cuda/bin/ncu")
NO_COUNTERS = "ERR_NVGPUCTRPERM"
"""Message of ncu if users may not read the counters of the GPU."""
NCU_CALLS = 3
MOST_CALLS = 4
ON_TRITON = {"NEGTOME_FAST_BACKEND": "triton"}
"""Environment in which no other backend can take the place of the kernels."""


def shapes_of(setting: SuiteRun) -> tuple[str, ...]:
    return REHEARSED_SHAPES if setting.rehearse else SHAPES


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"bench.{name}", *arguments]


def processors() -> int:
    """Number of processes that may compile at the same time; one processor is kept free."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


# --- kernels


def _kinds_process(setting: SuiteRun, kinds: Sequence[str], seconds: float) -> dict[str, Any]:
    command = module("gpu.kinds", setting.device, str(setting.work), *kinds)
    return run(f"kernels {' '.join(kinds)}", command, setting, seconds, ON_TRITON)


def warm_up(setting: SuiteRun, shapes: Sequence[str]) -> list[Callable[[], dict[str, Any]]]:
    """Calls that each compile the kernels of a shape in a new process.

    Shapes that this run has compiled are left out. A rehearsal interprets, and tries one shape.
    """
    missing = [text for text in shapes if text not in setting.warmed]
    missing = missing[:1] if setting.rehearse and not setting.warmed else missing
    if setting.rehearse and setting.warmed:
        missing = []
    setting.warmed.update(shapes)

    def call(text: str) -> Callable[[], dict[str, Any]]:
        command = module("gpu.warm", setting.device, text, "1", *sorted(setting.broken))
        return lambda: run(f"warm-up {text}", command, setting, 60.0, ON_TRITON)

    return [call(text) for text in missing]


def compiled_first(setting: SuiteRun, shapes: Sequence[str]) -> float:
    """Compile the kernels of shapes on all processors, and return the seconds that it took."""
    started = time.monotonic()
    together(warm_up(setting, shapes), processors())
    return time.monotonic() - started


def run_kernels(setting: SuiteRun, seconds: float) -> dict[str, Any]:
    """Check every kind in its own process, and note the kinds that fail in `setting.broken`.

    The kernels of the main shapes are compiled meanwhile, so that all processors have work.
    """
    # A rehearsal has few processors and a short time.
    groups = [KINDS[:4], KINDS[4:]] if setting.rehearse else [(kind,) for kind in KINDS]
    kinds = [lambda g=group: _kinds_process(setting, g, seconds * 0.95) for group in groups]
    done = together([*kinds, *warm_up(setting, shapes_of(setting))], processors())
    processes = {kind: one for group, one in zip(groups, done, strict=False) for kind in group}
    stage: dict[str, Any] = {"kinds": {}, "lost": {}, "passed": 0, "failed": 0}
    for kind, process in processes.items():
        _read_kind(setting, stage, kind, process)
    stage["cut_short"] = any(one["cut_short"] for one in done[: len(groups)])
    warm = done[len(groups) :]
    stage["warm_up"] = [{k: one[k] for k in ("exit_code", "took_seconds")} for one in warm]
    return stage


def _read_kind(
    setting: SuiteRun, stage: dict[str, Any], kind: str, process: dict[str, Any]
) -> None:
    found = read_json(setting.work / file_of(kind)) or {"kind": kind, "checks": [], "running": "-"}
    stage["kinds"][kind] = found
    good = sum(check["passed"] for check in found["checks"])
    bad = len(found["checks"]) - good
    stage["passed"] += good
    stage["failed"] += bad
    if not found.get("complete") and not found.get("lost"):
        ended = "ran out of time" if process["cut_short"] else f"died ({process['exit_code']})"
        why = f"the process {ended} in: {found.get('running')}"
        stage["lost"][kind] = {"error": why, "log": process["log"]}
        # A kind that ran out of time is not known to be broken.
        bad += not process["cut_short"]
        stage["failed"] += not process["cut_short"]
    if bad:
        setting.broken.add(kind)


# --- times


def benchmark(
    name: str, options: Sequence[str], setting: SuiteRun, seconds: float, case_limit: float | None
) -> dict[str, Any]:
    """`python -m bench run`, started again if a shape ends its process.

    A shape that takes more than `case_limit` seconds has a kernel that hangs; None is no limit. A
    case holds the predicted ratio beside the measured one, and the traceback of an error.
    """
    path = setting.work / f"{name}.json"
    command = module("__main__", "run", "--device", setting.device, "--out", str(path))
    command += ["--resume", *options]
    if setting.broken and not setting.rehearse:
        command += ["--without", *sorted(setting.broken)]
    stage: dict[str, Any] = {}
    left = seconds
    for _ in range(MOST_CALLS):
        known = len((read_json(path) or {}).get("cases", ()))
        deadline = ["--deadline", str(max(left * 0.85, 1.0))]
        limits = ["--case-limit", str(min(case_limit, left))] if case_limit else []
        stage = run(name, [*command, *deadline, *limits], setting, left, ON_TRITON)
        left -= stage["took_seconds"]
        result = read_json(path) or {}
        ended = result.get("complete") or stage["cut_short"] or left < 15
        if ended or (len(result.get("cases", ())) == known and not result.get("running")):
            break
    result = read_json(path)
    if result:
        for case in result.get("cases", ()):
            case["prediction"] = predictions.beside(case)
        stage["result"] = result
        stage["cut_short"] = stage["cut_short"] or not result.get("complete")
    return stage


def run_times(setting: SuiteRun, seconds: float) -> dict[str, Any]:
    """Time the main shapes against the bare matmul with the same multiply-adds."""
    shapes = shapes_of(setting)
    seconds -= compiled_first(setting, shapes)
    options = ["--no-memory", "--against", "matmul", "--seconds"]
    options += ["0.05" if setting.rehearse else "1.5"]
    for text in shapes:
        options += ["--shape", text]
    case_limit = None if setting.rehearse else 30.0
    return benchmark("times", options, setting, seconds, case_limit)


def run_each(setting: SuiteRun, seconds: float) -> dict[str, Any]:
    """Time every kernel by itself."""
    path = setting.work / "each.json"
    marks = f"={','.join(sorted(setting.broken))}" if setting.broken else ""
    shapes = [text + marks for text in shapes_of(setting)]
    command = module("gpu.each", setting.device, str(path), *shapes)
    stage = run("each", command, setting, seconds, ON_TRITON)
    return stage | {"result": read_json(path)}


# --- the profiler of the machine code


def find_tool(names: Sequence[str]) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)


def run_ncu(setting: SuiteRun, seconds: float) -> dict[str, Any]:
    """Report of ncu on the tile kernel at the first shape: ncu.txt, and all counters in ncu.csv.

    Clocks stay as they are, because others may use the machine.
    """
    text = shapes_of(setting)[0]
    program = module("gpu.warm", setting.device, text, str(NCU_CALLS), *sorted(setting.broken))
    if setting.rehearse:
        # The program runs without the tool that would watch it.
        return run("ncu", program, setting, seconds, ON_TRITON)
    tool = find_tool(PROFILERS)
    if tool is None:
        return {"skipped": "ncu is not installed"}
    report = setting.work / "tile.ncu-rep"
    command = [tool, "--clock-control", "none", "--set", "full", "--force-overwrite"]
    command += ["--kernel-name", "regex:(tiled_match|fused)_kernel", "--launch-skip", "1"]
    command += ["--launch-count", "1", "--export", str(report), *program]
    stage = run("ncu", command, setting, seconds * 0.8, ON_TRITON)
    if any(NO_COUNTERS in line for line in stage["log"]):
        return {"skipped": f"this machine does not let ncu read its counters ({NO_COUNTERS})"}
    if report.exists():
        stage["files"] = _exported(tool, report, setting, seconds * 0.1)
    return stage


def _exported(tool: str, report: Path, setting: SuiteRun, seconds: float) -> list[str]:
    kept = []
    for name, options in (
        ("ncu.txt", ["--page", "details"]),
        ("ncu.csv", ["--page", "raw", "--csv"]),
    ):
        label = f"export {name}"
        done = run(label, [tool, "--import", str(report), *options], setting, seconds)
        output = setting.work / f"{label.replace(' ', '-')}.log"
        if done["exit_code"] == 0:
            shutil.copyfile(output, setting.out / name)
            kept.append(name)
    return kept


STAGES = {
    "kernels": Stage(0.42, run_kernels),
    "times": Stage(0.30, run_times),
    "each": Stage(0.13, run_each),
    "ncu": Stage(0.15, run_ncu),
}
