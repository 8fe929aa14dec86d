"""One command for a machine with a GPU: `python bench/gpu_suite.py --out DIR`, at most 8 minutes.

Stages, most important first; each has a share of the time and inherits what earlier ones left:

tests       the operator's tests with compiled kernels, the large cases among them
shapes      the shapes of models against the authors' function, the split version and the matmul
tune        searches launch configurations for the main shapes: DIR/<arch>.json
tuned       the shapes again with that table, also against what `torch.compile` makes of the rivals
end-to-end  what guidance adds to FLUX.1-dev, SDXL and Wan (needs diffusers; the rest does not)
growth      tokens, batch and channels
sanitizer   a small run of every kernel under compute-sanitizer, where that is installed

After each, `DIR/gpu_suite.json` is replaced by one that holds all there is; `cut_short` there says
that time ran out before the end. Needs torch, triton, numpy and pytest, uses pytest-xdist; the
project need not be installed. `--rehearse` goes through the same stages on a CPU, with Triton's
interpreter and tiny sizes. As `bench/results/gpu.json` the file fills the README's tables.

Exit code: 0 nothing failed, 1 something did, 2 no GPU or bad input.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

LIMIT_SECONDS = 480.0
#: Kept back for ending cleanly.
MARGIN_SECONDS = 10.0
#: A stage that could only have less than this is not begun.
LEAST_SECONDS = 5.0
#: Processes that test at the same time, where pytest-xdist is there: most time goes to compiling.
MOST_WORKERS = 8
#: The tests that run kernels, most important first; those a checkout does not have are left out.
TESTS = (
    "test_on_device.py",
    "test_operator.py",
    "test_triton_kernels.py",
    "test_tuning.py",
    "test_ties.py",
    "test_torch_library.py",
    "test_compat.py",
    "test_gradients.py",
    "test_export.py",
)
REHEARSED_TESTS = ("test_on_device.py",)
SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
LOG_LINES = 30


@dataclass(frozen=True)
class Setting:
    """Where a stage works: `out` is kept, `work` is not."""

    out: Path
    work: Path
    rehearse: bool

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def environment(self) -> dict[str, str]:
        """Of every process of the suite."""
        return {
            "TRITON_INTERPRET": "1" if self.rehearse else "0",
            "NEGTOME_FAST_TUNED": str(self.out),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(
                os.pathsep
            ),
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


def _log_end(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []


def _run(
    name: str,
    command: Sequence[str],
    setting: Setting,
    seconds: float,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """A stage that is one process: exit code, whether it was cut short, the end of its output."""
    log = setting.work / f"{name}.log"
    code = run_limited(command, log, seconds, setting.environment | (environment or {}))
    return {"exit_code": code, "cut_short": code is None, "log": _log_end(log)}


def _with_result(stage: dict[str, Any], path: Path) -> dict[str, Any]:
    """The stage with what its process had written, also one that was ended."""
    if path.exists():
        stage["result"] = json.loads(path.read_text())
    return stage


# --- tests


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
    kernels = "triton or on_device"
    return {"triton": ["-k", kernels], "rest": ["-k", f"not ({kernels})"]}


def run_tests(setting: Setting, seconds: float) -> dict[str, Any]:
    """The tests that exist, on the GPU."""
    names = REHEARSED_TESTS if setting.rehearse else TESTS
    tests = [f"tests/{name}" for name in names if (ROOT / "tests" / name).exists()]
    if not tests:
        return {"failed": 1, "skipped": "there are no tests in this checkout"}
    outcomes = setting.work / "tests.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.pytest_outcomes"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", *tests]
    environment = {"NEGTOME_FAST_OUTCOMES": str(outcomes), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    codes: dict[str, int | None] = {}
    ends: dict[str, list[str]] = {}
    for name, options in pytest_passes().items():
        left = seconds - (time.monotonic() - started)
        # Without time to start, a run counts as one that was ended.
        codes[name] = None
        if left > 1.0:
            stage = _run(f"tests-{name}", [*command, *options], setting, left, environment)
            codes[name], ends[name] = stage["exit_code"], stage["log"]
    return {
        "files": tests,
        "exit_codes": codes,
        "cut_short": None in codes.values(),
        "log": ends,
        **read_outcomes(outcomes),
    }


# --- benchmarks


def _bench(name: str, options: Sequence[str], setting: Setting, seconds: float) -> dict[str, Any]:
    """`python -m bench run`; the shapes that it finished in time."""
    path = setting.work / f"{name}.json"
    command = [sys.executable, "-m", "bench", "run", "--device", setting.device]
    command += ["--deadline", str(max(seconds * 0.8, 1.0)), "--out", str(path)]
    command += options
    if setting.rehearse:
        command += ["--quick", "--seconds", "0.1", "--no-memory"]
    return _with_result(_run(name, command, setting, seconds), path)


def run_shapes(setting: Setting, seconds: float) -> dict[str, Any]:
    options = ["--series", "shapes", "--seconds", "2", "--against", "authors", "split", "matmul"]
    return _bench("shapes", options, setting, seconds)


def run_tuned(setting: Setting, seconds: float) -> dict[str, Any]:
    rivals = ["authors", "split", "matmul"]
    if not setting.rehearse:
        rivals += ["authors-compiled", "split-compiled", "matmul-into"]
    options = ["--series", "shapes", "--seconds", "2", "--against", *rivals]
    return _bench("tuned", options, setting, seconds)


def run_growth(setting: Setting, seconds: float) -> dict[str, Any]:
    options = ["--series", "tokens", "batch", "channels", "--seconds", "0.5"]
    return _bench("growth", options, setting, seconds)


def run_end_to_end(setting: Setting, seconds: float) -> dict[str, Any]:
    if not importlib.util.find_spec("diffusers"):
        return {"skipped": "diffusers is not installed"}
    path = setting.work / "end-to-end.json"
    command = [sys.executable, "-m", "bench", "end-to-end", "--device", setting.device]
    command += ["--seconds", "0.1" if setting.rehearse else "15", "--out", str(path)]
    command += ["--deadline", str(max(seconds * 0.7, 1.0))]
    if setting.rehearse:
        command += ["--tiny", "--models", "flux"]
    return _with_result(_run("end-to-end", command, setting, seconds), path)


# --- tuning and checking


def architecture() -> str:
    """As the tuning tables are named: `sm_90`, `gfx942`."""
    import torch

    if torch.version.hip:
        return str(torch.cuda.get_device_properties(0).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def run_tune(setting: Setting, seconds: float) -> dict[str, Any]:
    """`negtome-fast tune`; later stages find its table by the environment."""
    if not (ROOT / "negtome_fast" / "tune.py").exists():
        return {"skipped": "this checkout has no tuner"}
    if setting.rehearse:
        options = ["--dry-run", "--quick", "--shapes", "8x1024x1280/2"]
        table = setting.out / "none.json"
    else:
        table = setting.out / f"{architecture()}.json"
        options = ["--seconds", str(seconds * 0.85), "--out", str(table)]
    program = "import sys, bench; from negtome_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    stage = _run("tune", [sys.executable, "-c", program, "tune", *options], setting, seconds)
    return stage | {"table": json.loads(table.read_text()) if table.exists() else None}


def run_sanitizer(setting: Setting, seconds: float) -> dict[str, Any]:
    """memcheck on a small run; in a rehearsal the small run alone."""
    command = [sys.executable, "-m", "bench.small_run", setting.device]
    if not setting.rehearse:
        tool = next(filter(None, map(shutil.which, SANITIZERS)), None)
        if tool is None:
            return {"skipped": "compute-sanitizer is not installed"}
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *command]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return _run("sanitizer", command, setting, seconds, environment)


@dataclass(frozen=True)
class Stage:
    """`share` of the limit is its own; `run(setting, seconds)` gives what is written down."""

    share: float
    run: Callable[[Setting, float], dict[str, Any]]


STAGES = {
    "tests": Stage(0.27, run_tests),
    "shapes": Stage(0.14, run_shapes),
    "tune": Stage(0.17, run_tune),
    "tuned": Stage(0.16, run_tuned),
    "end-to-end": Stage(0.16, run_end_to_end),
    "growth": Stage(0.06, run_growth),
    "sanitizer": Stage(0.04, run_sanitizer),
}


# --- verdicts


def tests_failed(tests: dict[str, Any]) -> bool:
    """Whether a test failed, or none passed; being cut short is not a failure."""
    # 5: a selection of tests that is empty.
    ended_badly = any(code not in (0, 5, None) for code in tests.get("exit_codes", {}).values())
    return ended_badly or bool(tests.get("failed")) or not tests.get("passed")


def stage_failed(name: str, stage: dict[str, Any]) -> bool:
    """Whether a stage failed or measured a wrong result; skipped or cut short is not a failure."""
    if name == "tests" and "exit_codes" in stage:
        return tests_failed(stage)
    cases = stage.get("result", {}).get("cases", ())
    bad_code = stage.get("exit_code") not in (0, None)
    return bad_code or bool(stage.get("failed")) or any("wrong" in case for case in cases)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu_suite.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_SECONDS, help="seconds in all, default 480"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="default: all of them")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny sizes")
    return parser


def run_stages(
    names: Sequence[str], setting: Setting, limit: float, results: dict[str, Any]
) -> None:
    """Fills `results["stages"]` and saves after each stage, whatever happens in it."""
    from bench.results import save

    started = time.monotonic()
    report = setting.out / "gpu_suite.json"
    total = sum(STAGES[name].share for name in names)
    usable = limit - MARGIN_SECONDS
    planned = 0.0
    for name in names:
        # Up to the end of its share, counted from the start: what others left it has too.
        planned += STAGES[name].share / total * usable
        seconds = planned - (time.monotonic() - started)
        begun = time.monotonic()
        if seconds < LEAST_SECONDS:
            stage: dict[str, Any] = {"exit_code": None, "cut_short": True}
        else:
            try:
                stage = STAGES[name].run(setting, seconds)
            except Exception as error:
                # Whatever is wrong with one stage must not cost the results of the others.
                stage = {"failed": 1, "error": f"{type(error).__name__}: {error}"}
        stage["took_seconds"] = round(time.monotonic() - begun, 1)
        stage["failed_here"] = stage_failed(name, stage)
        results["stages"][name] = stage
        results["cut_short"] = any(s.get("cut_short") for s in results["stages"].values())
        results["took_seconds"] = round(time.monotonic() - started, 1)
        save(report, results)
        print(f"--- {name}: {summary(stage)}", flush=True)
        ends = stage.get("log", [])
        for lines in ends.values() if isinstance(ends, dict) else [ends]:
            print("\n".join(lines), flush=True)


def summary(stage: dict[str, Any]) -> str:
    """A line about a stage."""
    if isinstance(stage.get("skipped"), str):
        return f"skipped: {stage['skipped']}"
    said = "FAILED" if stage["failed_here"] else "passed"
    if stage.get("cut_short"):
        said += ", cut short"
    counts = [f"{stage[key]} {key}" for key in ("passed", "failed", "skipped") if key in stage]
    counts += [stage["error"]] if "error" in stage else []
    return f"{said} in {stage['took_seconds']:.0f} s {', '.join(counts)}".rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    arguments = build_parser().parse_args(argv)
    try:
        import torch
    except ModuleNotFoundError:
        print("gpu_suite.py: torch is not installed here", file=sys.stderr)
        return 2
    if not arguments.rehearse and not torch.cuda.is_available():
        print(
            "gpu_suite.py: there is no GPU that torch can use here; --rehearse runs on a CPU",
            file=sys.stderr,
        )
        return 2
    out = arguments.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu_suite.py: {error}", file=sys.stderr)
        return 2

    from bench import machine
    from bench.results import SCHEMA

    results: dict[str, Any] = {"schema": SCHEMA, **machine.describe()}
    results |= {"rehearsal": arguments.rehearse, "limit_seconds": arguments.limit}
    results |= {"cut_short": False, "stages": {}}
    names = [name for name in STAGES if name in (arguments.stages or STAGES)]
    with tempfile.TemporaryDirectory() as work:
        setting = Setting(out, Path(work), arguments.rehearse)
        run_stages(names, setting, arguments.limit, results)
    failed = [name for name, stage in results["stages"].items() if stage["failed_here"]]
    print(f"written to {out / 'gpu_suite.json'}" + (", cut short" if results["cut_short"] else ""))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
