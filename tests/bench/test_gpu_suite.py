"""The GPU suite's own machinery: limits, verdicts, processes that die, kinds that are left out."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_suite, results
from bench.__main__ import main as bench_main
from bench.compared.shapes import parse_shape
from bench.gpu import checks, full, kinds, processes, smoke, suite
from bench.gpu.processes import Log, SuiteRun
from bench.suites import operator as bench_run
from bench.timing import launches

ROOT = Path(__file__).resolve().parents[2]


def setting(folder: Path, rehearse: bool = True) -> SuiteRun:
    (folder / "work").mkdir(exist_ok=True)
    return SuiteRun(folder, folder / "work", rehearse, Log(folder / "suite.log"))


# --- the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("call", ["smoke", "full"])
def test_without_a_gpu_it_says_so(call: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "bench/gpu_suite.py", call, "--out", str(tmp_path / "suite")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "suite").exists()


def test_bad_options_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["smoke", "--rehearse", "--out", str(tmp_path)]
    for options, said in ((["--stages", "tune"], "unknown tune"), (["--limit", "-1"], "--limit")):
        assert gpu_suite.main([*words, *options]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("triton", "numpy", "refused"),
    [("3.6.0", "2.5.1", True), ("3.6.0", "2.4.6", False), ("3.7.1", "2.5.1", False)],
)
def test_no_rehearsal_where_the_interpreter_fails(
    triton: str, numpy: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"triton": triton, "numpy": numpy}
    monkeypatch.setattr(importlib.metadata, "version", found.__getitem__)
    reason = gpu_suite.interpreter_refusal()
    assert (reason is not None) is refused
    assert not refused or f"triton {triton}" in str(reason)


@pytest.mark.parametrize("call", ["smoke", "full"])
def test_stages_have_all_of_the_time_and_are_described(call: str) -> None:
    stages = {"smoke": smoke.STAGES, "full": full.STAGES}[call]
    assert sum(stage.share for stage in stages.values()) == pytest.approx(1.0)
    assert gpu_suite.LIMITS == {"smoke": 180.0, "full": 450.0}
    (part,) = [p for p in gpu_suite.__doc__.split("\n\n") if p.startswith(f"{call}, at most")]
    assert [line.split()[0] for line in part.splitlines()[1:]] == list(stages)


# --- stages


def test_it_writes_after_each_stage_and_survives_a_broken_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[list[str]] = []
    path = tmp_path / "suite.json"

    def works(setting: SuiteRun, seconds: float) -> dict[str, Any]:
        written.append(list(json.loads(path.read_text())["stages"]) if path.exists() else [])
        return {"exit_code": 0, "cut_short": False, "log": ["the end of a log"]}

    def breaks(setting: SuiteRun, seconds: float) -> dict[str, Any]:
        works(setting, seconds)
        raise KeyError("gone")

    runs = {"a": works, "b": breaks, "c": works}
    stages = {name: suite.Stage(1.0, run) for name, run in runs.items()}
    found: dict[str, Any] = {"stages": {}}
    place = setting(tmp_path)
    suite.run_stages(stages, list(stages), place, 100.0, found, path)
    assert written == [[], ["a"], ["a", "b"]]
    saved = json.loads(path.read_text())
    assert [stage["failed_here"] for stage in saved["stages"].values()] == [False, True, False]
    assert "KeyError" in saved["stages"]["b"]["error"]
    assert "line" in saved["stages"]["b"]["traceback"]
    assert "raise KeyError" in place.log.path.read_text()
    lines = suite.final_lines(saved)
    assert " ".join(lines[2].split()) == "b FAILED in 0 s 1 failed, KeyError: 'gone'"
    assert "b: FAILED" in capsys.readouterr().out


def test_it_keeps_to_its_limit_and_hands_on_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, given = 0.0, {}

    def takes(name: str, share: float) -> suite.Stage:
        def run(setting: SuiteRun, seconds: float) -> dict[str, Any]:
            nonlocal now
            given[name] = seconds
            now += {"quick": 1.0, "slow": seconds, "late": seconds}[name]
            return {"exit_code": None if name == "slow" else 0, "cut_short": name == "slow"}

        return suite.Stage(share, run)

    shares = {"quick": 0.5, "slow": 0.3, "late": 0.2}
    stages = {name: takes(name, share) for name, share in shares.items()}
    monkeypatch.setattr(suite.time, "monotonic", lambda: now)
    found: dict[str, Any] = {"stages": {}}
    place, path = setting(tmp_path), tmp_path / "suite.json"
    limit = 100.0 + suite.MARGIN_SECONDS
    suite.run_stages(stages, list(shares), place, limit, found, path)
    assert given == pytest.approx({"quick": 50.0, "slow": 79.0, "late": 20.0})
    assert now == pytest.approx(100.0) and found["cut_short"]

    # A stage without time does not begin.
    limit = suite.MARGIN_SECONDS + 2.0
    suite.run_stages(stages, list(shares), place, limit, found := {"stages": {}}, path)
    assert found["stages"]["late"]["cut_short"]


@pytest.mark.parametrize(
    ("tests", "failed"),
    [
        ({"exit_codes": {"kernels": 0}, "passed": 3, "failed": 0}, False),
        ({"exit_codes": {"kernels": 0, "others": 5}, "passed": 3, "failed": 0}, False),
        ({"exit_codes": {"kernels": None}, "passed": 3, "failed": 0, "cut_short": True}, False),
        ({"exit_codes": {"kernels": None}, "passed": 3, "failed": 1, "cut_short": True}, True),
        ({"exit_codes": {"kernels": None}, "passed": 0, "failed": 0, "cut_short": True}, True),
        ({"exit_codes": {"kernels": 4}, "passed": 0, "failed": 0}, True),
        ({"failed": 1, "error": "there are no tests in this checkout"}, True),
    ],
    ids=str,
)
def test_tests_cut_short_are_no_failure(tests: dict[str, Any], failed: bool) -> None:
    assert suite.stage_failed("tests", tests) is failed


@pytest.mark.parametrize(
    ("stage", "failed"),
    [
        ({"exit_code": 0, "result": {"cases": [{}]}}, False),
        ({"exit_code": 0, "result": None}, False),
        ({"exit_code": None, "cut_short": True}, False),
        ({"skipped": "diffusers is not installed"}, False),
        ({"exit_code": None, "result": {"cases": [{"wrong": "why"}]}}, True),
        ({"exit_code": 1}, True),
        ({"failed": 1, "error": "KeyError"}, True),
    ],
    ids=str,
)
def test_stages_cut_short_are_no_failure(stage: dict[str, Any], failed: bool) -> None:
    assert suite.stage_failed("shapes", stage) is failed


# --- processes


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    started = time.monotonic()
    assert processes.run_limited(command, tmp_path / "log", 1.0, {}) is None
    assert time.monotonic() - started < 300


def test_the_log_holds_the_whole_output_of_every_process(tmp_path: Path) -> None:
    place = setting(tmp_path)
    code = "import sys; [print('line', n) for n in range(99)]; sys.exit(7)"
    stage = processes.run("some part", [sys.executable, "-c", code], place, 100.0)
    assert stage["exit_code"] == 7 and len(stage["log"]) == processes.PRINTED_LINES
    text = place.log.path.read_text()
    assert "some part: exit code 7" in text and "line 0\n" in text and "line 98\n" in text


def test_the_log_stays_below_what_may_be_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MOST_LOG_BYTES", 10_000)
    log = Log(tmp_path / "log")
    for name in ("first", "second"):
        log.add(name, "begin " + "x" * 50_000 + " end")
    text = log.path.read_text()
    assert len(text) < 10_000 and text.count("begin ") == text.count(" end") == 2


# --- kinds of kernels


def test_a_failing_check_is_kept_whole_and_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad() -> None:
        raise AssertionError("off by one")

    def some(kind: str, device: str) -> Any:
        yield "first", bad
        yield "second", lambda: None

    monkeypatch.setattr(kinds, "checks", some)
    assert kinds.main(["cpu", str(tmp_path), "tiles"]) == 1
    found = json.loads((tmp_path / "tiles.json").read_text())
    assert found["complete"] and [c["passed"] for c in found["checks"]] == [False, True]
    assert "in bad" in found["checks"][0]["traceback"]


def test_after_a_device_fault_the_process_of_a_kind_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(kinds, "checks", lambda kind, device: iter([("a", bad), ("b", bad)]))
    monkeypatch.setattr(kinds, "lost", lambda device: "an illegal memory access")
    assert kinds.main(["cpu", str(tmp_path), "tiles", "fused"]) == 3
    found = json.loads((tmp_path / "tiles.json").read_text())
    assert len(found["checks"]) == 1 and found["lost"] == "an illegal memory access"
    assert not (tmp_path / "fused.json").exists()


def test_a_kind_whose_process_dies_is_named_and_the_others_keep_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = setting(tmp_path, rehearse=False)
    good = {"complete": True, "checks": [{"check": "c", "passed": True}], "running": None}

    def child(
        name: str, command: Any, place: SuiteRun, seconds: float, *rest: Any
    ) -> dict[str, Any]:
        kind = name.removeprefix("kernels ")
        died = kind == "tiles"
        found = {"kind": kind, **good}
        if died:
            found |= {"complete": False, "running": "right, first"}
        if name.startswith("kernels"):
            results.save(place.work / kinds.file_of(kind), found)
        code = -11 if died else 0
        return {"exit_code": code, "cut_short": False, "took_seconds": 1.0, "log": ["a fault"]}

    monkeypatch.setattr(smoke, "run", child)
    stage = smoke.run_kernels(place, 60.0)
    assert place.broken == {"tiles"}
    assert stage["lost"]["tiles"]["error"] == "the process died (-11) in: right, first"
    assert stage["passed"] == len(launches.KINDS) and stage["failed"] == 1
    assert suite.stage_failed("kernels", stage)
    assert ("tiles", "the process died (-11) in: right, first") in suite.failures(stage)
    # Every main shape was compiled beside the checks.
    assert len(stage["warm_up"]) == len(smoke.SHAPES) and not smoke.warm_up(place, smoke.SHAPES)


@pytest.mark.parametrize(
    ("shape", "broken", "expected"),
    [
        ("2x8x8", [], (None, {})),
        ("2x8x8", ["pairs", "nudge", "push", "coarse"], (None, {})),
        ("2x8x8", ["tiles flattened"], (None, {"FLATTEN": 0})),
        ("2x8x8", ["tiles overlapped"], (None, {"OVERLAP": 0})),
        ("2x8x8", ["tiles by descriptors"], ("tiles", {"DESCRIPTORS": 0, "FLATTEN": 0})),
        ("2x8x8", ["tiles"], ("tiles", {"DESCRIPTORS": 1})),
        ("2x8x8", ["fused"], ("tiles", {})),
        ("2x8x8", ["tiles", "tiles by descriptors"], ("fused", {})),
        ("2x8x8", ["push_from_keys", "tiles flattened"], ("fused", {})),
        ("3x8x8,others", ["pairs by descriptors"], ("tiles", {"DESCRIPTORS": 0, "FLATTEN": 0})),
        ("3x8x8,others", ["pairs", "pairs by descriptors"], ("fused", {})),
        (
            "2x8x8",
            ["push_from_keys", "fused"],
            "fused, push_from_keys failed: no way to launch is left",
        ),
        ("2x8x8", ["scale"], "scale failed, which everything needs"),
    ],
)
def test_what_failed_is_left_out(shape: str, broken: list[str], expected: Any) -> None:
    assert launches.choice(parse_shape(shape), broken) == expected


def test_a_launch_is_changed_inside_and_not_after() -> None:
    from negtome_fast.kernels import tuning

    problem = ("sm_90", "bfloat16", 3, 4096, 4096, 3072)
    before = tuning.plan(*problem)
    assert before.kind == "tiles" and before.tiles.DESCRIPTORS == 1
    with launches.launching("fused", launches.POINTERS):
        inside = tuning.plan(*problem)
    assert inside.kind == "fused" and inside.tiles.DESCRIPTORS == inside.pairs.DESCRIPTORS == 0
    assert tuning.plan(*problem) == before


def test_a_kernel_that_writes_nothing_or_twice_is_caught() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    (work, *_) = checks.works("push_from_keys", torch.bfloat16, "cpu")

    def unwritten(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, similarity, pushed = work.call(x)
        # A program that writes nothing leaves the poison.
        return (
            torch.where(torch.arange(len(y))[:, None, None] == 1, torch.nan, y),
            similarity,
            pushed,
        )

    with pytest.raises(AssertionError):
        work.verify(work.x, unwritten(work.x))
    calls = iter(range(100))
    other = checks.Work("w", work.x, lambda x: (x + next(calls),), work.verify)
    with pytest.raises(AssertionError, match="other bits"):
        checks._same_bits(other)


# --- benchmarks that go on


def test_a_shape_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = bench_run.measure

    def breaks(shape: Any, *arguments: Any, **options: Any) -> Any:
        if shape.tokens == 8:
            raise RuntimeError("no such kernel")
        return original(shape, *arguments, **options)

    monkeypatch.setattr(bench_run, "measure", breaks)
    out = tmp_path / "r.json"
    words = ["--device", "cpu", "--seconds", "0.01", "--no-memory", "--against", "matmul"]
    words += ["--shape", "2x8x8", "--shape", "3x9x8,others", "--out", str(out)]
    assert bench_main(words) == 1
    first, second = json.loads(out.read_text())["cases"]
    assert first["wrong"] == "did not run: RuntimeError: no such kernel"
    assert "in breaks" in first["traceback"] and "times" in second


def test_a_run_that_died_goes_on_after_the_shape_that_it_died_of(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    words = ["--device", "cpu", "--seconds", "0.01", "--no-memory", "--against", "matmul"]
    words += ["--shape", "2x8x8", "--shape", "2x9x8", "--shape", "2x10x8", "--out", str(out)]
    assert bench_main(words) == 0
    whole = json.loads(out.read_text())
    running = {k: whole["cases"][1][k] for k in ("name", "shape", "dtype", "series")}
    results.save(out, {**whole, "cases": whole["cases"][:1], "running": running})
    assert bench_main([*words, "--resume"]) == 1
    cases = json.loads(out.read_text())["cases"]
    assert [case["shape"] for case in cases] == ["2x8x8", "2x9x8", "2x10x8"]
    assert "did not come back" in cases[1]["wrong"] and cases[0] == whole["cases"][0]


def test_the_benchmark_is_begun_again_where_a_shape_takes_it_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = setting(tmp_path, rehearse=False)
    place.broken.add("fused")
    calls: list[list[str]] = []

    def child(
        name: str, command: list[str], place: SuiteRun, seconds: float, *rest: Any
    ) -> dict[str, Any]:
        calls.append(command)
        done = len(calls) == 2
        found = {"cases": [{"shape": "s", "dtype": "d"}] * len(calls), "complete": done}
        results.save(place.work / "times.json", found if done else found | {"running": {}})
        code = 0 if done else -11
        return {"exit_code": code, "cut_short": False, "took_seconds": 5.0, "log": []}

    monkeypatch.setattr(smoke, "run", child)
    stage = smoke.benchmark("times", [], place, 60.0, case_limit=30.0)
    assert len(calls) == 2 and not stage["cut_short"] and len(stage["result"]["cases"]) == 2
    assert calls[0][calls[0].index("--without") + 1 :][0] == "fused"


def test_rivals_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec("json")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: there if name == "flashlib" else None
    )
    found, missing = full.installed_rivals()
    assert found == ["flashlib", "flashlib-match"]
    assert missing == {"flash-kmeans": "flash-kmeans is not installed"}
