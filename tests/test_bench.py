"""The benchmarks measure what they say: baselines, statistics, the check before the clock."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import baselines, correctness, gpu_suite, memory, report, timing
from bench.__main__ import main as bench_main
from bench.shapes import Shape, parse_shape, random_tokens
from negtome_fast.functional import negtome

ROOT = Path(__file__).resolve().parent.parent
TINY = Shape("tiny", 4, 60, 24, groups=2)


# --- shapes and tokens


def test_parse_shape_reads_groups() -> None:
    shape = parse_shape("8x4096x640/2")
    assert (shape.items, shape.tokens, shape.channels, shape.groups) == (8, 4096, 640, 2)
    assert parse_shape(str(shape)) == shape


@pytest.mark.parametrize("text", ["", "4x5", "4x5x6x7", "4x0x6", "3x5x6/2", "2x5x6/2", "1x5x6"])
def test_parse_shape_rejects(text: str) -> None:
    with pytest.raises(ValueError, match="shape"):
        parse_shape(text)


def test_multiply_adds_skip_the_reference_items() -> None:
    assert parse_shape("8x10x3/2").multiply_adds == 6 * 10 * 10 * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_tokens_straddle_the_threshold(dtype: torch.dtype) -> None:
    shape = Shape("some", 3, 400, 320)
    x = random_tokens(shape, dtype, "cpu")
    assert x.isfinite().all() and torch.equal(x, random_tokens(shape, dtype, "cpu"))
    cosine = (F.normalize(x[1:].float(), dim=-1) @ F.normalize(x[0].float(), dim=-1).T).amax(-1)
    assert 0.3 < (cosine > baselines.THRESHOLD).float().mean() < 0.7


# --- baselines


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_authors_is_the_official_matching(dtype: torch.dtype, groups: int) -> None:
    x = random_tokens(Shape("any", 4, 60, 24, groups), dtype, "cpu")
    y = baselines.authors(x, groups, alpha=0.7, threshold=0.5)
    expected = negtome(
        x, alpha=0.7, threshold=0.5, groups=groups, matching="official", backend="reference"
    )
    # Theirs pushes the reference from itself, which gives it back up to rounding.
    torch.testing.assert_close(y, expected, rtol=0, atol=100 * torch.finfo(dtype).eps)
    assert not torch.equal(y, x)


def test_authors_differs_from_the_paper_matching() -> None:
    x = random_tokens(TINY, torch.float64, "cpu")
    paper = negtome(x, groups=2, backend="reference")
    assert not torch.allclose(baselines.authors(x, 2), paper)


@pytest.mark.parametrize("groups", [1, 2])
def test_matmul_stores_every_product_of_source_and_reference(groups: int) -> None:
    x = torch.randn(4, 10, 6)
    product = baselines.matmul(x, groups)
    size = 4 // groups
    for group in range(groups):
        part = x[group * size : (group + 1) * size]
        expected = (part[1:] @ part[0].T).reshape(-1, 10)
        torch.testing.assert_close(product[group], expected)
    into = baselines.matmul_into(x, torch.full_like(product, torch.nan), groups)
    torch.testing.assert_close(into, product)


# --- the check before the clock


def test_check_accepts_the_operator() -> None:
    checked = correctness.check(TINY, random_tokens(TINY, torch.float32, "cpu"))
    assert checked["checked"] == 2 * TINY.tokens
    assert 0 < checked["pushed_share"] < 1


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda y, index: y[0].add_(1), "reference item 0 was changed"),
        (lambda y, index: y[1].mul_(1.001), "tokens are wrong"),
        (lambda y, index: index.copy_((index + 1) % TINY.tokens), "from the best"),
        (lambda y, index: index.fill_(-1), "matched no token"),
    ],
    ids=["reference", "output", "match", "nothing"],
)
def test_check_catches_wrong_results(
    monkeypatch: pytest.MonkeyPatch, breakage: object, message: str
) -> None:
    import negtome_fast.functional as functional

    x = random_tokens(TINY, torch.float32, "cpu")
    y = functional.negtome(x, groups=TINY.groups)
    similarity, index = functional.match_tokens(x, groups=TINY.groups)
    breakage(y, index)  # type: ignore[operator]
    monkeypatch.setattr(functional, "negtome", lambda *args, **kwargs: y)
    monkeypatch.setattr(functional, "match_tokens", lambda *args, **kwargs: (similarity, index))
    with pytest.raises(correctness.WrongResult, match=message):
        correctness.check(TINY, x)


def test_a_wrong_case_is_reported_without_times() -> None:
    case = {"name": "n", "shape": "2x3x4", "dtype": "float32", "multiply_adds": 36, "wrong": "why"}
    text = "\n".join(report.case_lines(case))
    assert "WRONG, no times: why" in text and "ours" not in text


# --- statistics


def test_summary_of_known_samples() -> None:
    summary = timing.summarize([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (summary.median, summary.p20, summary.p80, summary.samples) == (3.5, 2.0, 5.0, 6)


def test_summary_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        timing.summarize([])


def test_ratio_is_paired_so_that_drift_cancels() -> None:
    drift = [1.0, 2.0, 5.0, 3.0]
    ratio = timing.pairwise_ratio([3 * t for t in drift], drift)
    assert ratio.median == ratio.p20 == ratio.p80 == 3.0


def test_ratio_of_unequal_counts_is_an_error() -> None:
    with pytest.raises(ValueError, match="paired"):
        timing.pairwise_ratio([1.0], [1.0, 2.0])


def test_interleave_takes_turns_until_the_time_is_over() -> None:
    now = 0.0
    order: list[str] = []

    def sampler(name: str) -> timing.Sampler:
        def sample() -> float:
            nonlocal now
            now += 1.0
            order.append(name)
            return now

        return sample

    samples = timing.interleave(
        {"a": sampler("a"), "b": sampler("b")}, seconds=6, min_rounds=1, clock=lambda: now
    )
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [len(taken) for taken in samples.values()] == [3, 3]


def test_interleave_keeps_to_the_least_and_most_rounds() -> None:
    for seconds, rounds in ((0.0, 5), (1e9, 7)):
        samples = timing.interleave({"a": lambda: 0.0}, seconds, min_rounds=5, max_rounds=7)
        assert len(samples["a"]) == rounds


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (4.2e-5, "42 us")]
)
def test_time_text(seconds: float, text: str) -> None:
    assert report.time_text(seconds) == text


# --- memory


@pytest.mark.skipif(not memory.RESET.exists(), reason="the system does not count peaks")
def test_peak_memory_sees_the_similarity_matrix() -> None:
    shape = parse_shape("2x2048x32")
    matrix = 4 * shape.tokens**2
    extra = memory.cpu_extra_bytes("matmul", shape, "float32", threads=1)
    assert extra is not None and matrix * 0.95 < extra < matrix * 1.5


# --- the commands


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_bench_writes_a_result_and_prints_a_table(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "result.json"
    options = ["--quick", "--device", "cpu", "--shape", "4x96x32/2", "--seconds", "0.2"]
    options += ["--against", "authors", "matmul", "matmul-into", "--no-memory"]
    done = run("-m", "bench", *options, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "time / ours" in done.stdout and "bare matmul" in done.stdout
    result = json.loads(out.read_text())
    assert result["versions"]["torch"] == torch.__version__
    assert {"commit", "cpu", "threads", "date", "gpu"} <= result.keys()
    (case,) = result["cases"]
    assert case["correct"]["checked"] == 2 * 96
    assert case["times"]["authors"]["times_ours"]["median"] > 0
    assert case["times"]["ours"]["times_ours"]["median"] == 1


@pytest.mark.parametrize(
    "options", [["--shape", "4x5"], ["--seconds", "-1"], ["--against", "nobody"]], ids=str
)
def test_bench_rejects_bad_options(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_main(options)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_bench_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_main(["--device", "cuda"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_gpu_suite_without_a_gpu_says_so(tmp_path: Path) -> None:
    done = run("bench/gpu_suite.py", "--out", str(tmp_path / "suite"))
    assert done.returncode == 2
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "suite").exists()


def test_the_project_is_importable_where_it_is_not_installed() -> None:
    # -S leaves site-packages out, and with them an editable install; torch is not needed.
    code = (
        "import sys; import bench._path, importlib.util; "
        "spec = importlib.util.find_spec('negtome_fast.kernels.pairing'); print(spec.origin)"
    )
    stub = "import types; package = types.ModuleType('negtome_fast'); package.__path__ = []; "
    stub += "import sys; sys.modules['negtome_fast'] = package; "
    stub += "sys.modules['torch'] = types.ModuleType('torch'); "
    done = run("-S", "-c", stub + code)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "pairing.py"


def test_a_test_run_cut_short_leaves_its_outcomes(tmp_path: Path) -> None:
    lines = [
        {"test": "a", "outcome": "passed", "why": ""},
        {"test": "b", "outcome": "failed", "why": "AssertionError"},
    ]
    path = tmp_path / "outcomes.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"test": "c", "outc')
    counted = gpu_suite.read_outcomes(path)
    assert (counted["passed"], counted["failed"], counted["skipped"]) == (1, 1, 0)
    assert counted["failures"] == {"b": "AssertionError"}
    assert gpu_suite.read_outcomes(tmp_path / "none")["passed"] == 0


@pytest.mark.parametrize(
    ("tests", "failed"),
    [
        ({"exit_codes": {"all": 0}, "passed": 3, "failed": 0}, False),
        ({"exit_codes": {"triton": 0, "rest": 5}, "passed": 3, "failed": 0}, False),
        ({"exit_codes": {"all": None}, "passed": 3, "failed": 0, "cut_short": True}, False),
        ({"exit_codes": {"all": None}, "passed": 3, "failed": 1, "cut_short": True}, True),
        ({"exit_codes": {"all": None}, "passed": 0, "failed": 0, "cut_short": True}, True),
        ({"exit_codes": {"all": 4}, "passed": 0, "failed": 0}, True),
        ({"skipped": "there are no tests in this checkout"}, True),
    ],
    ids=str,
)
def test_tests_cut_short_are_no_failure(tests: dict[str, object], failed: bool) -> None:
    assert gpu_suite.tests_failed(tests) is failed


@pytest.mark.parametrize(
    ("benchmark", "failed"),
    [
        ({"exit_code": 0, "result": {"cases": [{}]}}, False),
        ({"exit_code": None, "cut_short": True}, False),
        ({"exit_code": None, "result": {"cases": [{"wrong": "why"}]}}, True),
        ({"exit_code": 1}, True),
    ],
    ids=str,
)
def test_benchmarks_cut_short_are_no_failure(benchmark: dict[str, object], failed: bool) -> None:
    assert gpu_suite.benchmark_failed(benchmark) is failed


@pytest.mark.parametrize("parallel", [True, False])
def test_gpu_suite_runs_every_test_once(
    parallel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").mkdir()
    program = "import pytest\n@pytest.mark.parametrize('b', ['torch', 'triton'])\n"
    (tmp_path / "tests" / "test_operator.py").write_text(program + "def test_a(b): pass\n")
    if parallel:
        pytest.importorskip("xdist")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_suite, "MOST_WORKERS", 1)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tests = gpu_suite.run_tests(tmp_path, 250.0)
    assert (tests["passed"], tests["failed"], tests["cut_short"]) == (2, 0, False)
    assert set(tests["exit_codes"].values()) == {0}
    assert tests["exit_codes"].keys() == ({"all"} if parallel else {"triton", "rest"})
    assert not gpu_suite.tests_failed(tests)


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    started = time.monotonic()
    assert gpu_suite.run_limited(command, tmp_path / "log", 1.0, {}) is None
    assert time.monotonic() - started < 300


def test_outcomes_are_written_as_they_come(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    outcomes = tmp_path / "outcomes.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.pytest_outcomes"]
    command += ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    environment = {"NEGTOME_FAST_OUTCOMES": str(outcomes)}
    assert gpu_suite.run_limited(command, tmp_path / "log", 120.0, environment) == 1
    counted = gpu_suite.read_outcomes(outcomes)
    assert (counted["passed"], counted["failed"]) == (1, 1)
