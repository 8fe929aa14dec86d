"""The report: one page that needs nothing else, every figure from the files, nothing hidden."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest

from bench import results
from bench.compared.candidates import CANDIDATES
from bench.drawn import plots, report
from bench.suites import end_to_end

pytest.importorskip("matplotlib", reason="plots are drawn with matplotlib")


def summary(median: float) -> dict[str, float]:
    return {"median": median, "p20": 0.9 * median, "p80": 1.1 * median, "samples": 5}


def case(shape: str, series: str = "shapes", **more: Any) -> dict[str, Any]:
    """A made-up case in which a rival of rank k takes k + 1 times as long as ours."""
    times = {
        name: {
            "seconds": summary(1e-3 * (rank + 1)),
            "times_ours": summary(rank + 1),
            "tflops": 0.5 / (rank + 1),
            "of_matmul": 0.5 / (rank + 1),
            "of_copy": 0.25 / (rank + 1),
        }
        for rank, name in enumerate(CANDIDATES)
    }
    return {
        "name": f"case of {shape}",
        "shape": shape,
        "dtype": "float32",
        "series": series,
        "multiply_adds": 10**9,
        "least_bytes": 10**7,
        "correct": {"checked": 512, "pushed_share": 0.5},
        "times": times,
        "extra_bytes": {"ours": 2**20, "authors": 2**24},
        **more,
    }


def result(*cases: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "versions": {"torch": "9.9.9"},
        "cpu": "some <CPU>",
        "threads": 2,
        "gpu": None,
        "date": "2026-01-02T03:04:05",
        "commit": "0123456789abcdef",
        "changed_files": 0,
        "ceilings": {
            "dtype": "float32",
            "matmul_side": 64,
            "matmul_tflops": 1.0,
            "copy_bytes_per_second": 1e10,
        },
        "cases": list(cases),
        **more,
    }


def everything() -> dict[str, Any]:
    cases = [case("4x100x32"), case("4x200x32/2")]
    cases += [case(f"2x{n}x32", "tokens") for n in (256, 512)]
    cases += [case(f"{b}x64x32", "batch") for b in (2, 4)]
    cases += [case(f"2x64x{d}", "channels") for d in (32, 64)]
    return result(*cases)


def model() -> dict[str, Any]:
    step = end_to_end.added({"without": [1.0] * 6, "ours": [1.01] * 6, "authors": [1.04] * 6})
    return {
        "name": "some model",
        "images": 4,
        "steps": 20,
        "guided_steps": 5,
        "step": step | {"blocks": 3},
        "run": end_to_end.added_up(step, 20, 5),
    }


def written(tmp_path: Path, *found: dict[str, Any]) -> tuple[str, list[Path]]:
    files = []
    for number, part in enumerate(found):
        files.append(tmp_path / f"r{number}.json")
        results.save(files[-1], part)
    paths = report.write(files, tmp_path / "out")
    return paths[0].read_text(encoding="utf-8"), paths[1:]


def test_page_holds_all_plots_and_needs_nothing_else(tmp_path: Path) -> None:
    page, images = written(tmp_path, everything(), result(models=[model()]) | {"cases": []})
    names = {path.name for path in images}
    kinds = ("speed-ups", "roofline", "growth", "sweeps")
    assert names == {f"r0-{kind}.png" for kind in kinds} | {"r1-end-to-end.png"}
    inside = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(code) for code in inside] == [path.read_bytes() for path in images]
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in images)


def test_page_says_machine_versions_and_commit(tmp_path: Path) -> None:
    page, _ = written(tmp_path, everything())
    assert "some &lt;CPU&gt;" in page and "torch 9.9.9" in page and "0123456789ab" in page
    assert "1 TFLOP/s" in page and "10 GB/s" in page


def test_what_is_wrong_or_left_out_is_said(tmp_path: Path) -> None:
    wrong = {key: value for key, value in case("4x1x2").items() if key not in ("times", "correct")}
    failed = case("4x5x6")
    failed["times"]["authors"] = {"failed": "needs 34 GiB, 20 GiB are free"}
    page, _ = written(
        tmp_path, result(wrong | {"wrong": "tokens"}, wrong | {"skipped": "no time"}, failed)
    )
    assert "WRONG, tokens" in page and "not measured, no time" in page
    assert "did not run: needs 34 GiB" in page


def test_a_rehearsal_is_called_one(tmp_path: Path) -> None:
    suite = {key: value for key, value in everything().items() if key != "cases"}
    suite |= {"rehearsal": True, "cut_short": True, "stages": {"shapes": {"result": everything()}}}
    page, _ = written(tmp_path, suite)
    assert "A rehearsal" in page and "Time ran out" in page and "case of 4x100x32" in page


def test_bars_are_the_ratios_of_the_file() -> None:
    figure = plots.speed_ups(everything())
    assert figure is not None
    (axes,) = figure.axes
    widths = sorted({round(bar.get_width(), 6) for bar in axes.patches})
    assert widths == [float(rank + 1) for rank in range(1, len(CANDIDATES))]


def test_roofline_shows_what_is_beyond_the_ceiling() -> None:
    found = everything()
    case = next(
        case for case in found["cases"] if "tflops" in case.get("times", {}).get("ours", {})
    )
    case["times"]["ours"]["tflops"] = 40 * found["ceilings"]["matmul_tflops"]
    figure = plots.roofline(found)
    assert figure is not None
    assert figure.axes[0].get_ylim()[1] > 40 * found["ceilings"]["matmul_tflops"]


def test_growth_shows_where_a_rival_does_not_fit() -> None:
    found = everything()
    large = next(c for c in found["cases"] if c["shape"] == "2x512x32")
    large["extra_bytes"]["authors"] = {"failed": "needs 34 GiB, 20 GiB are free"}
    figure = plots.growth(found)
    assert figure is not None
    assert any("does not fit" in text.get_text() for text in figure.axes[1].texts)


def test_no_figure_without_figures() -> None:
    empty = result()
    assert plots.speed_ups(empty) is plots.growth(empty) is plots.sweeps(empty) is None
    assert plots.roofline(empty) is None and plots.end_to_end([]) is None


def test_bad_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{]")
    assert report.main([str(bad), "--out", str(tmp_path / "out")]) == 2
    assert "is not JSON" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_of_the_repository_make_a_page(tmp_path: Path) -> None:
    assert report.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").stat().st_size > 10_000
