"""One command for a machine with a GPU: `python bench/gpu_suite.py --out DIR`.

Runs the operator's tests compiled (not interpreted), then the microbenchmark, most important first
and within a deadline, and writes `DIR/gpu_suite.json` with what it has; `cut_short` there says that
time ran out before the end. Needs torch, triton, numpy and pytest, uses pytest-xdist; the project
need not be installed. Exit code: 0 nothing failed, 1 something did, 2 no GPU or bad input.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

SCHEMA = 1
LIMIT_SECONDS = 480.0
#: Share of the limit after which tests are cut off, so that the benchmark always has its turn.
TEST_SHARE = 0.4
#: Kept back for ending cleanly.
MARGIN_SECONDS = 10.0
#: Processes that test at the same time, where pytest-xdist is there: most time goes to compiling.
MOST_WORKERS = 8
#: The tests that run kernels, most important first; those a checkout does not have are left out.
TESTS = (
    "test_operator.py",
    "test_triton_kernels.py",
    "test_ties.py",
    "test_torch_library.py",
    "test_compat.py",
    "test_gradients.py",
)
#: First what the targets are about, then what takes long to compile.
BENCHMARKS = {
    "eager": ["authors", "matmul"],
    "compiled": ["authors-compiled"],
}


def run_limited(
    command: Sequence[str], log: Path, seconds: float, environment: dict[str, str]
) -> int | None:
    """Exit code of `command`, whose output goes to `log`; None where it was ended after `seconds`.

    It runs in a process group of its own, so that its children end with it.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def read_outcomes(path: Path) -> dict[str, Any]:
    """Counts and the failures from what `bench.pytest_outcomes` wrote, also of a run cut short."""
    outcomes: dict[str, str] = {}
    failures: dict[str, str] = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            # The last line of a run that was cut short may be half of one.
            continue
        outcomes[entry["test"]] = entry["outcome"]
        if entry["outcome"] == "failed":
            failures[entry["test"]] = entry["why"]
    counts = {
        kind: sum(outcome == kind for outcome in outcomes.values())
        for kind in ("passed", "failed", "skipped")
    }
    return counts | {"failures": failures}


def pytest_passes() -> dict[str, list[str]]:
    """Name and options of the runs of pytest: one in parallel, or two, the kernels' tests first."""
    if importlib.util.find_spec("xdist"):
        workers = min(MOST_WORKERS, os.cpu_count() or 1)
        return {"all": ["-n", str(workers), "--dist", "worksteal"]}
    return {"triton": ["-k", "triton"], "rest": ["-k", "not triton"]}


def run_tests(out: Path, seconds: float) -> dict[str, Any]:
    """The tests that exist, on the GPU."""
    tests = [f"tests/{name}" for name in TESTS if (ROOT / "tests" / name).exists()]
    if not tests:
        return {"skipped": "there are no tests in this checkout"}
    outcomes = out / "tests.jsonl"
    outcomes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.pytest_outcomes"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", *tests]
    environment = {
        "TRITON_INTERPRET": "0",
        "NEGTOME_FAST_OUTCOMES": str(outcomes),
        "OMP_NUM_THREADS": "1",
    }
    started = time.monotonic()
    codes: dict[str, int | None] = {}
    for name, options in pytest_passes().items():
        left = seconds - (time.monotonic() - started)
        # Without time to start, a run counts as one that was ended.
        codes[name] = None
        if left > 1.0:
            log = out / f"tests-{name}.log"
            codes[name] = run_limited([*command, *options], log, left, environment)
    return {
        "files": tests,
        "exit_codes": codes,
        "cut_short": None in codes.values(),
        "took_seconds": round(time.monotonic() - started, 1),
        **read_outcomes(outcomes),
    }


def run_benchmark(name: str, against: list[str], out: Path, seconds: float) -> dict[str, Any]:
    """`python -m bench` against some candidates; the shapes that it finished in time."""
    result = out / f"bench-{name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench", "--device", "cuda", "--seconds", "4"]
    command += ["--deadline", str(max(seconds * 0.8, 1.0)), "--out", str(result)]
    command += ["--against", *against]
    code = run_limited(command, out / f"bench-{name}.log", seconds, {})
    summary: dict[str, Any] = {"exit_code": code, "cut_short": code is None}
    if result.exists():
        summary["result"] = json.loads(result.read_text())
    return summary


def tests_failed(tests: dict[str, Any]) -> bool:
    """Whether a test failed, or none passed; being cut short is not a failure."""
    # 5: a selection of tests that is empty.
    ended_badly = any(code not in (0, 5, None) for code in tests.get("exit_codes", {}).values())
    return ended_badly or bool(tests.get("failed")) or not tests.get("passed")


def benchmark_failed(benchmark: dict[str, Any]) -> bool:
    """Whether a benchmark failed or measured a wrong result; being cut short is not a failure."""
    cases = benchmark.get("result", {}).get("cases", ())
    return benchmark["exit_code"] not in (0, None) or any("wrong" in case for case in cases)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="gpu_suite.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_SECONDS, help="seconds in all, default 480"
    )
    arguments = parser.parse_args(argv)
    try:
        import torch
    except ModuleNotFoundError:
        print("gpu_suite.py: torch is not installed here", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu_suite.py: there is no GPU that torch can use here", file=sys.stderr)
        return 2
    out = arguments.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu_suite.py: {error}", file=sys.stderr)
        return 2

    from bench import machine

    def left() -> float:
        return arguments.limit - MARGIN_SECONDS - (time.monotonic() - started)

    results: dict[str, Any] = {"schema": SCHEMA, **machine.describe()}
    results |= {"cut_short": False, "tests": {}, "benchmarks": {}}
    report = out / "gpu_suite.json"

    def save() -> None:
        stages = [results["tests"], *results["benchmarks"].values()]
        results["cut_short"] = any(stage.get("cut_short") for stage in stages)
        results["took_seconds"] = round(time.monotonic() - started, 1)
        report.write_text(json.dumps(results, indent=1) + "\n")

    results["tests"] = run_tests(out, arguments.limit * TEST_SHARE)
    save()
    counted = {key: value for key, value in results["tests"].items() if key != "failures"}
    print("tests:", counted, flush=True)
    for name, against in BENCHMARKS.items():
        if left() < MARGIN_SECONDS:
            results["benchmarks"][name] = {"exit_code": None, "cut_short": True}
        else:
            results["benchmarks"][name] = run_benchmark(name, against, out, left())
            print((out / f"bench-{name}.log").read_text(), flush=True)
        save()
    print(f"written to {report}" + (", cut short" if results["cut_short"] else ""))
    failed = tests_failed(results["tests"])
    return int(failed or any(map(benchmark_failed, results["benchmarks"].values())))


if __name__ == "__main__":
    sys.exit(main())
