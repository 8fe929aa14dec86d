"""Parts of the benchmarks: baselines, statistics, the check before the clock, the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import results
from bench.__main__ import main as bench_main
from bench.compared import baselines, candidates
from bench.compared.shapes import Shape, parse_shape, random_tokens
from bench.drawn import compare, tables
from bench.gpu import small_run
from bench.suites import plan
from bench.timing import ceilings, clock, correctness, measure, memory
from docs.render import benchmarks
from negtome_fast.functional import negtome

ROOT = Path(__file__).resolve().parents[2]
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


def test_independent_tokens_are_not_alike() -> None:
    shape = parse_shape("4x400x320/2,independent")
    assert shape.independent and parse_shape(str(shape)) == shape
    x = F.normalize(random_tokens(shape, torch.float32, "cpu"), dim=-1)
    assert float((x[1] @ x[0].T).amax()) < 0.4
    assert not torch.equal(x[0], x[1])


# --- baselines


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_authors_is_the_official_matching(dtype: torch.dtype, groups: int) -> None:
    x = random_tokens(Shape("any", 4, 60, 24, groups), dtype, "cpu")
    y = baselines.authors(x, groups, alpha=0.7, threshold=0.5)
    expected = negtome(
        x, alpha=0.7, threshold=0.5, groups=groups, matching="official", backend="reference"
    )
    # Theirs pushes the reference from itself, which leaves it equal up to rounding.
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


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [7, 60, 1000])
def test_split_is_the_paper_matching(dtype: torch.dtype, groups: int, rows: int) -> None:
    x = random_tokens(Shape("any", 4, 60, 24, groups), dtype, "cpu")
    y = baselines.split(x, groups, rows=rows)
    expected = negtome(x, alpha=0.9, threshold=0.65, groups=groups, backend="reference")
    torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert not torch.equal(y, x)


def test_split_stores_bounded_scores() -> None:
    for shape in (TINY, parse_shape("2x75600x5120"), parse_shape("4x4096x640")):
        choices = candidates.split_rows(shape)
        total = (shape.items // shape.groups - 1) * shape.tokens
        assert choices == sorted(set(choices)) and choices[0] >= 1 and choices[-1] <= total
        for rows in choices:
            assert 4 * rows * shape.tokens <= candidates.SPLIT_BYTES
            assert -(-total // rows) <= candidates.MOST_CHUNKS


def test_fastest_is_the_one_that_took_least() -> None:
    now = 0.0

    def call(seconds: float) -> candidates.Call:
        def work(x: torch.Tensor) -> torch.Tensor:
            nonlocal now
            now += seconds
            return x

        return work

    calls = [call(3.0), call(1.0), call(2.0)]
    assert candidates.fastest(calls, torch.zeros(1), clock=lambda: now) is calls[1]


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


def test_check_judges_another_function_by_its_output() -> None:
    x = random_tokens(TINY, torch.float32, "cpu")
    checked = correctness.check(TINY, x, lambda x: baselines.split(x, TINY.groups))
    assert 0 < checked["pushed_share"] < 1
    with pytest.raises(correctness.WrongResult, match="tokens are wrong"):
        correctness.check(TINY, x, lambda x: baselines.split(x, TINY.groups, alpha=0.8))


def test_no_time_of_a_rival_whose_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "split", lambda x, groups, rows: x.clone())
    inputs = [random_tokens(TINY, torch.float32, "cpu")]
    times = measure.measure_times(TINY, inputs, ["ours", "split"], 0.0)
    assert times["split"].keys() == {"failed"} and "WrongResult" in times["split"]["failed"]
    assert times["ours"]["seconds"]["median"] > 0


def test_shares_of_the_ceilings() -> None:
    shape = parse_shape("2x1000x100")  # 0.2 GFLOP; 0.4 million elements at the least
    limits = {"matmul_tflops": 1.0, "copy_bytes_per_second": 1e9}
    speed = measure.speeds(shape, torch.float32, seconds=1e-3, limits=limits)
    assert speed == pytest.approx({"tflops": 0.2, "of_matmul": 0.2, "of_copy": 1.6})


def test_ceilings_are_measured_in_the_dtype_of_the_products() -> None:
    cpu = torch.device("cpu")
    limits = ceilings.measure(torch.bfloat16, cpu, sizes=(64, 2**16))
    assert limits["dtype"] == "float32"
    assert limits["matmul_tflops"] > 0 and limits["copy_bytes_per_second"] > 0
    assert "Ceilings" in tables.ceilings_line(limits)


def test_a_matrix_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, cpu = parse_shape("2x65536x640"), torch.device("cpu")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 20 * 2**30)
    refused = measure.refusal(shape, torch.float32, cpu)
    assert "needs 34 GiB" in str(refused("authors")) and refused("matmul") is None
    assert refused("ours") is None and refused("split") is None
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert measure.refusal(shape, torch.float32, cpu)("authors") is None


def test_a_wrong_case_is_reported_without_times() -> None:
    case = {"name": "n", "shape": "2x3x4", "dtype": "float32", "multiply_adds": 36, "wrong": "why"}
    text = "\n".join(tables.case_lines(case))
    assert "WRONG, no times: why" in text and "ours" not in text


# --- statistics


def test_summary_of_known_samples() -> None:
    summary = clock.summarize([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (summary.median, summary.p20, summary.p80, summary.samples) == (3.5, 2.0, 5.0, 6)


def test_summary_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        clock.summarize([])


def test_ratio_is_paired_so_that_drift_cancels() -> None:
    drift = [1.0, 2.0, 5.0, 3.0]
    ratio = clock.pairwise_ratio([3 * t for t in drift], drift)
    assert ratio.median == ratio.p20 == ratio.p80 == 3.0


def test_ratio_of_unequal_counts_is_an_error() -> None:
    with pytest.raises(ValueError, match="paired"):
        clock.pairwise_ratio([1.0], [1.0, 2.0])


def test_interleave_takes_turns_until_the_time_is_over() -> None:
    now = 0.0
    order: list[str] = []

    def sampler(name: str) -> clock.Sampler:
        def sample() -> float:
            nonlocal now
            now += 1.0
            order.append(name)
            return now

        return sample

    samples = clock.interleave(
        {"a": sampler("a"), "b": sampler("b")}, seconds=6, min_rounds=1, clock=lambda: now
    )
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [len(taken) for taken in samples.values()] == [3, 3]


def test_interleave_keeps_to_the_least_and_most_rounds() -> None:
    for seconds, rounds in ((0.0, 5), (1e9, 7)):
        samples = clock.interleave({"a": lambda: 0.0}, seconds, min_rounds=5, max_rounds=7)
        assert len(samples["a"]) == rounds


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (4.2e-5, "42 us")]
)
def test_time_text(seconds: float, text: str) -> None:
    assert tables.time_text(seconds) == text


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


def test_bench_writes_a_result_and_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "result.json"
    options = ["--device", "cpu", "--shape", "4x96x32/2", "--seconds", "0.2"]
    options += ["--against", "authors", "split", "matmul", "matmul-into", "--no-memory"]
    assert bench_main([*options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "time / ours" in printed and "bare matmul" in printed
    result = json.loads(out.read_text())
    assert result["versions"]["torch"] == torch.__version__
    assert {"commit", "cpu", "threads", "date", "gpu"} <= result.keys()
    (case,) = result["cases"]
    assert case["correct"]["checked"] == 2 * 96
    assert case["times"]["authors"]["times_ours"]["median"] > 0
    assert case["times"]["ours"]["times_ours"]["median"] == 1
    assert case["times"]["ours"]["of_matmul"] > 0 and result["complete"]
    assert compare.main([str(out), str(out)]) == 0


@pytest.mark.parametrize(
    "options", [["--shape", "2x65536x5120"], ["--shape", "2x64x16", "--longest", "1e-9"]]
)
def test_what_is_too_large_for_the_time_is_skipped_with_the_reason(
    options: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    assert bench_main(["--device", "cpu", *options, "--out", str(out)]) == 0
    (case,) = json.loads(out.read_text())["cases"]
    assert "would take" in case["skipped"] and "times" not in case


def test_plans_cover_the_growth_to_65536_tokens() -> None:
    for entries in (plan.GPU, plan.CPU):
        tokens = [entry.shape.tokens for entry in entries if entry.series == "tokens"]
        assert tokens[0] == 256 and tokens[-1] == 65536
        series = plan.SERIES.keys() - ({"independent"} if entries is plan.GPU else set())
        assert {entry.series for entry in entries} == series
        keys = [(str(entry.shape), entry.dtype) for entry in entries if entry.series == "shapes"]
        assert len(keys) == len(set(keys))


# --- comparison


def outcome(median: float, spread: float = 0.01, **more: object) -> dict[str, object]:
    """A result file of one case whose time is `median` seconds, +- `spread` of it."""
    seconds = {"median": median, "p20": median * (1 - spread), "p80": median * (1 + spread)}
    rival = {"median": 2 / median, "p20": 2 / median, "p80": 2 / median}
    times = {"ours": {"seconds": seconds}, "matmul": {"seconds": seconds, "times_ours": rival}}
    case = {"shape": "2x3x4", "dtype": "float32", "times": times, **more}
    machine = {"versions": {}, "cpu": "c", "threads": 1, "gpu": None, "date": "2026-01-01"}
    return machine | {"cases": [case]}


@pytest.mark.parametrize(
    ("new", "verdict", "regressed"),
    [
        (outcome(1.0), "same to the noise", False),
        (outcome(1.2), "SLOWER", True),
        (outcome(0.8), "faster", False),
        (outcome(1.2, spread=0.2), "same to the noise", False),
        (outcome(1.02, spread=0.0), "same to the noise", False),
        (outcome(1.0, wrong="why"), "WRONG: why", True),
        (outcome(1.0, skipped="no time"), "skipped: no time", False),
        (outcome(1.0, times={"ours": {}}), "FAILED: no time of ours", True),
        (outcome(1.0, extra_bytes={"ours": 2**30}), "LARGER by 1023.0 MiB", True),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_regression_is_what_lies_beyond_the_noise(
    new: dict[str, object], verdict: str, regressed: bool
) -> None:
    (row,) = compare.compare(outcome(1.0, extra_bytes={"ours": 2**20}), new)
    assert (row.verdict, row.regressed) == (verdict, regressed)
    assert verdict in compare.text([row], "ours")


def test_comparison_by_a_rival_of_the_same_run() -> None:
    # All times of the second run are doubled.
    old, new = outcome(1.0), outcome(2.0)
    new["cases"][0]["times"]["matmul"]["times_ours"] = {"median": 2.0, "p20": 2.0, "p80": 2.0}
    assert compare.compare(old, new)[0].verdict == "SLOWER"
    assert compare.compare(old, new, by="matmul")[0].ratio == 1.0


def test_compare_exits_by_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {}
    for name, result in {"a": outcome(1.0), "slow": outcome(2.0), "none": {"x": 1}}.items():
        paths[name] = tmp_path / f"{name}.json"
        results.save(paths[name], result)
    assert compare.main([str(paths["a"]), str(paths["slow"])]) == 1
    assert "1 of 1 cases regressed" in capsys.readouterr().out
    assert compare.main([str(paths["slow"]), str(paths["a"])]) == 0
    assert compare.main([str(paths["a"]), str(paths["none"])]) == 2
    assert "is not a result" in capsys.readouterr().err
    assert compare.main([str(paths["a"]), str(tmp_path / "missing.json")]) == 2


def test_comparison_needs_a_common_case() -> None:
    other = outcome(1.0, shape="9x9x9")
    with pytest.raises(ValueError, match="no case in common"):
        compare.compare(outcome(1.0), other)


def test_a_later_stage_of_the_suite_has_the_last_word() -> None:
    first, tuned = outcome(1.0), outcome(0.5)
    suite = {"stages": {"shapes": {"result": first}, "tuned": {"result": tuned}, "tests": {}}}
    merged = results.micro(suite)
    assert merged is not None and merged["cases"] == tuned["cases"]
    assert results.micro({"stages": {}}) is None


def test_a_result_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.json"
    results.save(path, {"a": 1})
    with pytest.raises(TypeError):
        results.save(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


# --- the commands, continued


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


def test_the_project_is_importable_where_it_is_not_installed() -> None:
    # -S leaves out site-packages, and so an editable install; torch is not needed.
    code = (
        "import sys; import bench._path, importlib.util; "
        "spec = importlib.util.find_spec('negtome_fast.kernels.tuning'); print(spec.origin)"
    )
    stub = "import types; package = types.ModuleType('negtome_fast'); package.__path__ = []; "
    stub += "import sys; sys.modules['negtome_fast'] = package; "
    stub += "sys.modules['torch'] = types.ModuleType('torch'); "
    done = run("-S", "-c", stub + code)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "tuning.py"


def test_small_run_of_every_kernel() -> None:
    assert small_run.main("cuda" if torch.cuda.is_available() else "cpu") == 0


def test_tables_of_the_readme_read_the_file_of_the_suite() -> None:
    case = outcome(1.0, series="shapes", name="n", multiply_adds=1)
    suite = {key: value for key, value in case.items() if key != "cases"}
    suite |= {"stages": {"tests": {}, "shapes": {"result": case}}}
    assert "2x3x4 float32" in benchmarks.speed(suite)
    assert benchmarks.end_to_end(suite) == "not measured"
    assert "not measured" in benchmarks.speed({**suite, "stages": {}})
