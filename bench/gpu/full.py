"""The stages of `full`: tuning, benchmarks with the new table, tests, and all that takes long."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._path import ROOT
from ..compared import rivals
from ..suites import plan
from .processes import SuiteRun, read_json, run
from .smoke import ON_TRITON, benchmark, compiled_first, find_tool, module
from .suite import Stage

MOST_WORKERS = 14
"""Maximum number of processes of pytest-xdist; compiling takes most of the time."""
TEST_SECONDS = 120
"""Limit of a test; most take seconds, the slowest compile for half a minute."""
KERNEL_TESTS = (
    "operator/test_on_device.py",
    "operator/test_triton_kernels.py",
    "operator/test_tile_launches.py",
    "operator/test_operator.py",
    "nudging/test_nudge.py",
    "operator/test_ties.py",
    "operator/test_division.py",
    "operator/test_triton_coarse.py",
)
OTHER_TESTS = (
    "operator/test_tuning.py",
    "operator/test_warmup.py",
    "operator/test_torch_library.py",
    "operator/test_gradients.py",
    "integrations/test_compat.py",
    "integrations/test_export.py",
    "integrations/test_export_header.py",
)
REHEARSED_TESTS = ("operator/test_on_device.py",)
REHEARSED_CHOICE = "test_in_place_gives_the_same_bits and first"
"""Selection of tests that keeps a rehearsal short."""
SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


# --- tuning


def architecture() -> str:
    """Name of the GPU's architecture in the tuning tables, such as `sm_90`, `gfx942`."""
    import torch

    if torch.version.hip:
        return str(torch.cuda.get_device_properties(0).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def run_tune(setting: SuiteRun, seconds: float) -> dict[str, Any]:
    """Run `negtome-fast tune`; later stages find its table through the environment."""
    if setting.rehearse:
        options = ["--dry-run", "--quick", "--shapes", "8x1024x1280/2"]
        table = setting.out / "none.json"
    else:
        table = setting.out / f"{architecture()}.json"
        options = ["--seconds", str(seconds * 0.85), "--out", str(table)]
    program = "import sys, bench; from negtome_fast.tuner import run as tune; "
    program += "from negtome_fast.cli import main; "
    # One candidate of each kernel is enough to go through it all.
    program += "tune.QUICK = 1; " if setting.rehearse else ""
    program += "sys.exit(main(sys.argv[1:]))"
    stage = run("tune", [sys.executable, "-c", program, "tune", *options], setting, seconds)
    return stage | {"table": read_json(table)}


# --- benchmarks


def installed_rivals() -> tuple[list[str], dict[str, str]]:
    """Rivals whose packages are installed, and the reason for each missing package."""
    found, missing = [], {}
    for package in rivals.ASSIGNMENTS:
        if importlib.util.find_spec(package.replace("-", "_")):
            found += [package, f"{package}-match"]
        else:
            missing[package] = f"{package} is not installed"
    return found, missing


def _bench(
    name: str,
    options: Sequence[str],
    setting: SuiteRun,
    seconds: float,
    case_limit: float | None = 60.0,
) -> dict[str, Any]:
    """`smoke.benchmark`, with a small shape in a rehearsal."""
    if setting.rehearse:
        options = [*options, "--shape", "3x64x32", "--no-memory"]
        options += [] if "--against" in options else ["--against", "authors"]
        case_limit = None
    return benchmark(name, options, setting, seconds, case_limit)


def run_tuned(setting: SuiteRun, seconds: float) -> dict[str, Any]:
    """Time the shapes of models against the rivals that a user would take instead."""
    found, missing = installed_rivals()
    if not setting.rehearse:
        shapes = [str(entry.shape) for entry in plan.GPU if entry.series == "shapes"]
        seconds -= compiled_first(setting, shapes)
    spent = "0.05" if setting.rehearse else "1.5"
    options = ["--series", "shapes", "--seconds", spent]
    options += ["--against", "authors", "split", "matmul", *found]
    return _bench("tuned", options, setting, seconds) | {"rivals_skipped": missing}


def run_compiled(setting: SuiteRun, seconds: float) -> dict[str, Any]:
    """Time the main shapes against compiled rivals, whose compiling takes minutes."""
    spent = "0.05" if setting.rehearse else "1"
    options = ["--seconds", spent, "--no-memory", "--against"]
    compiled = ["authors-compiled", "split-compiled", "matmul-into"]
    options += ["matmul-into"] if setting.rehearse else compiled
    if not setting.rehearse:
        for text in ("4x4096x3072", "8x1024x1280/2", "8x4096x640/2"):
            options += ["--shape", text]
    # The compiler may take a minute for a shape, so there is no limit for a hanging kernel.
    return _bench("compiled", options, setting, seconds, case_limit=None)


def run_coarse(setting: SuiteRun, seconds: float) -> dict[str, Any]:
    """Time kind "coarse" against tiles, and count the columns that it leaves in question."""
    path = setting.work / "coarse.json"
    command = module("__main__", "coarse-columns", "--out", str(path))
    command += ["--seconds", "0.05" if setting.rehearse else "2"]
    stage = run("coarse", command, setting, seconds, ON_TRITON)
    return stage | {"result": read_json(path) or {}}


def run_growth(setting: SuiteRun, seconds: float) -> dict[str, Any]:
    spent = "0.05" if setting.rehearse else "0.5"
    options = ["--series", "tokens", "batch", "channels", "--seconds", spent]
    return _bench("growth", options, setting, seconds)


def run_end_to_end(setting: SuiteRun, seconds: float) -> dict[str, Any]:
    if not importlib.util.find_spec("diffusers"):
        return {"skipped": "diffusers is not installed"}
    path = setting.work / "end-to-end.json"
    command = module("__main__", "end-to-end", "--device", setting.device, "--out", str(path))
    command += ["--seconds", "0.1" if setting.rehearse else "15"]
    command += ["--deadline", str(max(seconds * 0.7, 1.0))]
    if setting.rehearse:
        command += ["--tiny", "--models", "flux"]
    stage = run("end-to-end", command, setting, seconds)
    return stage | {"result": read_json(path) or {}}


def run_sanitizer(setting: SuiteRun, seconds: float) -> dict[str, Any]:
    """Run memcheck on a small run; a rehearsal has the small run alone."""
    command = module("gpu.small_run", setting.device)
    if not setting.rehearse:
        tool = find_tool(SANITIZERS)
        if tool is None:
            return {"skipped": "compute-sanitizer is not installed"}
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *command]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return run("sanitizer", command, setting, seconds, environment)


# --- tests


def read_outcomes(path: Path) -> dict[str, Any]:
    """Counts of outcomes, and the reason of each failed test, from `bench.gpu.pytest_outcomes`.

    A run that was cut short has outcomes too. The first failure of a test counts: after a device
    fault xdist reports the test again, without the reason.
    """
    outcomes: dict[str, str] = {}
    failures: dict[str, str] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            # A run that was cut short may end in half a line.
            continue
        if entry["outcome"] == "failed":
            failures.setdefault(entry["test"], entry["why"])
        if outcomes.get(entry["test"]) != "failed":
            outcomes[entry["test"]] = entry["outcome"]
    counts = {
        kind: sum(outcome == kind for outcome in outcomes.values())
        for kind in ("passed", "failed", "skipped")
    }
    return counts | {"failures": failures}


def pytest_passes(files: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Name -> arguments of each run of pytest, the tests of the kernels first.

    With pytest-xdist the tests run in parallel, and a worker that dies is replaced. Without it each
    file has its own process.
    """
    if importlib.util.find_spec("xdist"):
        workers = max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) - 1))
        options = ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "40"]
        named = zip(("kernels", "others"), files, strict=True)
        return {name: [*options, *some] for name, some in named if some}
    return {Path(file).stem: [file] for some in files for file in some}


def run_tests(setting: SuiteRun, seconds: float) -> dict[str, Any]:
    """Run the tests on the Triton backend alone."""
    chosen = (REHEARSED_TESTS, ()) if setting.rehearse else (KERNEL_TESTS, OTHER_TESTS)
    files = [
        [f"tests/{name}" for name in names if (ROOT / "tests" / name).exists()] for names in chosen
    ]
    if not any(files):
        return {"failed": 1, "error": "there are no tests in this checkout"}
    outcomes = setting.work / "tests.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.pytest_outcomes"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command += ["-k", REHEARSED_CHOICE] if setting.rehearse else []
    if importlib.util.find_spec("pytest_timeout"):
        # A kernel that hangs cannot be interrupted; this method ends the worker.
        command += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    environment = {"NEGTOME_FAST_OUTCOMES": str(outcomes), "OMP_NUM_THREADS": "1"}
    environment["NEGTOME_FAST_TEST_BACKENDS"] = "triton"
    started = time.monotonic()
    codes: dict[str, int | None] = {}
    log: list[str] = []
    for name, options in pytest_passes(files).items():
        left = seconds - (time.monotonic() - started)
        # A run that had no time to start counts as cut short.
        codes[name] = None
        if left > 1.0:
            stage = run(f"tests {name}", [*command, *options], setting, left, environment)
            codes[name] = stage["exit_code"]
            log += stage["log"]
    return {
        "files": [file for some in files for file in some],
        "exit_codes": codes,
        "cut_short": None in codes.values(),
        "log": log,
        **read_outcomes(outcomes),
    }


STAGES = {
    "tune": Stage(0.22, run_tune),
    "tuned": Stage(0.18, run_tuned),
    "tests": Stage(0.27, run_tests),
    "end-to-end": Stage(0.09, run_end_to_end),
    "coarse": Stage(0.05, run_coarse),
    "growth": Stage(0.05, run_growth),
    "sanitizer": Stage(0.05, run_sanitizer),
    "compiled": Stage(0.09, run_compiled),
}
