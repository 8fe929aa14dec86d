"""Runs stages within a time limit, saves results after each, and prints a table at the end."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compared import predictions
from ..drawn import tables
from ..results import save
from .processes import SuiteRun

MARGIN_SECONDS = 8.0
"""Time kept back for a clean end."""
LEAST_SECONDS = 5.0
"""A stage with less time than this does not begin."""


@dataclass(frozen=True)
class Stage:
    """A stage: its share of the limit, and `run(setting, seconds)`, which returns its results."""

    share: float
    run: Callable[[SuiteRun, float], dict[str, Any]]


def tests_failed(tests: dict[str, Any]) -> bool:
    """Return True if a test failed or none passed; a run that was cut short is not a failure."""
    # 5: no test was selected.
    ended_badly = any(code not in (0, 5, None) for code in tests.get("exit_codes", {}).values())
    return ended_badly or bool(tests.get("failed")) or not tests.get("passed")


def stage_failed(name: str, stage: dict[str, Any]) -> bool:
    """Return True if a stage failed or a result was wrong, not if it was skipped or cut short."""
    if name == "tests" and "exit_codes" in stage:
        return tests_failed(stage)
    cases = (stage.get("result") or {}).get("cases", ())
    bad_code = stage.get("exit_code") not in (0, None)
    return bad_code or bool(stage.get("failed")) or any("wrong" in case for case in cases)


def run_stages(
    stages: Mapping[str, Stage],
    names: Sequence[str],
    setting: SuiteRun,
    limit: float,
    results: dict[str, Any],
    path: Path,
) -> None:
    """Fill `results["stages"]`, and save to `path` after each stage, even if it raises.

    A stage ends at the end of its share, counted from the start, so it also has the time that
    earlier stages left.
    """
    started = time.monotonic()
    total = sum(stages[name].share for name in names)
    usable = limit - MARGIN_SECONDS
    planned = 0.0
    for name in names:
        planned += stages[name].share / total * usable
        seconds = planned - (time.monotonic() - started)
        begun = time.monotonic()
        print(f"--- {name}: at most {seconds:.0f} s", flush=True)
        stage: dict[str, Any]
        if seconds < LEAST_SECONDS:
            stage = {"exit_code": None, "cut_short": True, "error": "no time was left"}
        else:
            try:
                stage = stages[name].run(setting, seconds)
            except Exception as error:
                # One stage must not cost the results of the others.
                text = traceback.format_exc()
                setting.log.add(f"{name}: the suite itself failed", text)
                stage = {"failed": 1, "error": f"{type(error).__name__}: {error}"}
                stage["traceback"] = text
        stage["took_seconds"] = round(time.monotonic() - begun, 1)
        stage["failed_here"] = stage_failed(name, stage)
        results["stages"][name] = stage
        results["broken_kinds"] = sorted(setting.broken)
        results["cut_short"] = any(s.get("cut_short") for s in results["stages"].values())
        results["took_seconds"] = round(time.monotonic() - started, 1)
        save(path, results)
        if stage["failed_here"] or stage.get("cut_short"):
            print("\n".join(stage.get("log", [])), flush=True)
        print(f"--- {name}: {summary(stage)}", flush=True)


def summary(stage: dict[str, Any]) -> str:
    """Verdict, time and counts of a stage as one line."""
    if isinstance(stage.get("skipped"), str):
        return f"skipped: {stage['skipped']}"
    said = "FAILED" if stage["failed_here"] else "passed"
    if stage.get("cut_short"):
        said += ", cut short"
    counts = [f"{stage[key]} {key}" for key in ("passed", "failed", "skipped") if key in stage]
    counts += [stage["error"]] if "error" in stage else []
    return f"{said} in {stage['took_seconds']:.0f} s {', '.join(counts)}".rstrip()


def case_lines(results: dict[str, Any]) -> list[str]:
    """A line for each measured shape: time, ratio to the bare matmul, and the prediction."""
    rows = []
    for stage in results["stages"].values():
        for case in (stage.get("result") or {}).get("cases", ()):
            times = case.get("times", {})
            ours = times.get("ours", {})
            cells = [case.get("shape", "?"), case.get("dtype", "?")]
            if "wrong" in case:
                rows.append([*cells, "WRONG", "-", "-", str(case["wrong"])[:60]])
                continue
            if "seconds" not in ours:
                rows.append([*cells, "-", "-", "-", str(case.get("skipped", ""))[:60]])
                continue
            said = case.get("prediction") or {}
            over = predictions.ratio(case)
            ratio = "-" if over is None else f"{over:.2f}"
            expected = f"{said['low']:g} - {said['high']:g}" if said else "-"
            time_of = tables.time_text(ours["seconds"]["median"])
            rows.append([*cells, time_of, ratio, expected, said.get("verdict", "")])
    if not rows:
        return []
    header = ["shape", "dtype", "ours", "/ matmul", "predicted", ""]
    return tables.aligned([header, *rows])


def final_lines(results: dict[str, Any]) -> list[str]:
    """The last lines of the output: all stages, all failures, all measured shapes."""
    rows = [(name, summary(stage)) for name, stage in results["stages"].items()]
    lines = tables.aligned([("stage", ""), *rows])
    for name, stage in results["stages"].items():
        lines += [f"{name}: FAILED {what}: {why}" for what, why in failures(stage)]
    return [*lines, "", *case_lines(results)]


def failures(stage: dict[str, Any]) -> list[tuple[str, str]]:
    """Failures of a stage with the last line of the reason; the results have the whole text."""
    found = [
        (f"{kind['kind']}, {check['check']}", check["error"])
        for kind in stage.get("kinds", {}).values()
        for check in kind.get("checks", ())
        if not check["passed"]
    ]
    found += [(kind, one["error"]) for kind, one in stage.get("lost", {}).items()]
    for test, why in stage.get("failures", {}).items():
        found.append((test, why.splitlines()[-1] if why else ""))
    return [(what, " ".join(str(why).split())[:160]) for what, why in found[:40]]
