"""Every shipped launch configuration compiles well for every target; no GPU is needed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from docs.render import kernels
from negtome_fast.kernels import aot, tuning
from negtome_fast.tuner import compile_report

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "bench" / "results" / "compiled.json"
COMMAND = "make compile-tables"
#: The other compiler that users have; `make test` puts it there.
OTHER = "3.6.0"
OTHER_FOLDER = Path(os.environ.get("OTHER_TRITON", ROOT / ".venv" / f"triton-{OTHER}"))
ROW: dict[str, Any] = {
    "triton": "3.7.1",
    "target": "sm_80",
    "kernel": "tiles",
    "variant": "paper",
    "dtype": "bfloat16",
    "config": [64, 64, 32, 4, 4, 8, 2, 0, 0, 0],
    "registers": 168,
    "spills": 0,
    "shared": 32768,
    "shared_limit": 166912,
    "matrix_instructions": 16,
    "narrow_offsets": 0,
    "nan_maxima": 0,
    "programs": 3,
    "occupancy": 0.19,
    "error": None,
}


@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_shipped_configuration_compiles_well(target: str) -> None:
    # One test for each target, as compiling takes long: no two workers compile the same.
    rows = compile_report.report([target])
    # Triton's older wheels leave the last step for AMD to a linker of the machine.
    if all("ld.lld not found" in (row["error"] or "") for row in rows):
        pytest.skip(f"no linker for {target} on this machine")

    compiled = {(row["kernel"], row["dtype"], *row["config"]) for row in rows}
    shipped = {(kernel, dtype, *c) for kernel, dtype, c in tuning.shipped_configurations(target)}
    assert compiled == shipped
    by_descriptors = {tuple(r["config"]) for r in rows if "descriptors" in r["variant"]}
    assert by_descriptors == {c for *_, c in tuning.shipped_configurations(target) if c.DESCRIPTORS}

    assert_nothing_is_wrong(rows)
    kept = kept_rows("rows", target)
    if kept[0]["triton"] == triton.__version__:  # another compiler makes other code
        assert without_time(rows) == kept, f"out of date; run {COMMAND}"


def assert_nothing_is_wrong(rows: list[dict[str, Any]]) -> None:
    # Neither failures, spills, too much shared memory, nor half precision without tensor cores.
    wrong = [row for row in rows if compile_report.problems(row)]
    assert not wrong, "\n" + compile_report.table(wrong)


def kept_rows(which: str, target: str) -> list[dict[str, Any]]:
    """The saved rows of a target: "rows" by the installed Triton, "others" by the other one."""
    rows = json.loads(RESULT.read_text(encoding="utf-8"))[which]
    return [row for row in rows if row["target"] == target]


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_the_other_triton_compiles_sm_90_well() -> None:
    """`make compile-check` compiles the other targets, which takes long."""
    if triton.__version__ == OTHER:
        pytest.skip(f"Triton {OTHER} is the installed one")
    if not (OTHER_FOLDER / "complete").is_file():
        pytest.skip(f"no Triton {OTHER} at hand: `make other-triton` downloads it")
    rows = compile_report.report(["sm_90"], triton=OTHER_FOLDER)
    assert {row["triton"] for row in rows} == {OTHER}
    assert_nothing_is_wrong(rows)
    assert without_time(rows) == kept_rows("others", "sm_90"), f"out of date; run {COMMAND}"


def test_what_two_compilers_make_differently_is_told() -> None:
    line = compile_report.cells(ROW)
    other = compile_report.cells({**ROW, "registers": 170, "spills": 8})
    told = compile_report.comparison([line, line], [line, other], "3.7.1 -> 3.6.0")
    assert told.startswith("Triton 3.7.1 -> 3.6.0: 1 of 2 differ.\n\n| kernel |")
    assert "| 4 | 4 | 168 -> 170 | 0 -> 8 | 32 KiB | 16 | 3 | 19% | ok -> spills 8 |" in told
    assert told.count("tiles (paper)") == 1
    same = compile_report.comparison([line], [line], "3.7.1 -> 3.6.0")
    assert same == "Triton 3.7.1 -> 3.6.0: 0 of 1 differ."
    with pytest.raises(ValueError, match="rows of different kernels"):
        compile_report.differences([line], [compile_report.cells({**ROW, "kernel": "pairs"})])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"spills": 8}, ["spills 8"]),
        ({"shared": 10**6}, ["1000000 bytes of shared memory exceed 166912"]),
        ({"matrix_instructions": 0}, ["no tensor-core instruction"]),
        ({"dtype": "float32"}, ["fp32 rounded to TF32"]),
        ({"programs": 1}, ["1 programs fit a multiprocessor, not 2"]),
        ({"narrow_offsets": 3}, ["3 offsets of 32 bits into tokens"]),
        ({"nan_maxima": 2}, ["2 maxima that do not pass over NaN"]),
        ({"error": "does not compile", "spills": 8}, ["does not compile"]),
    ],
)
def test_report_shows_what_is_wrong_with_a_row(change: dict[str, Any], expected: list[str]) -> None:
    assert compile_report.problems(ROW) == []
    row = {**ROW, **change}
    assert compile_report.problems(row) == expected
    assert "tiles (paper)" in compile_report.table([row]) and expected[0] in compile_report.table(
        [row]
    )


def test_a_report_is_saved_a_row_on_a_line_without_its_time(tmp_path: Path) -> None:
    other = {**ROW, "triton": "3.6.0", "registers": 170}
    text = compile_report.saved([{**ROW, "seconds": 0.5}, ROW], [other])
    assert json.loads(text) == {"rows": [ROW, ROW], "others": [other]}
    assert sum('"kernel"' in line for line in text.splitlines()) == 3
    assert json.loads(compile_report.saved([ROW])) == {"rows": [ROW], "others": []}


def test_a_saved_report_that_differs_is_out_of_date(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "compiled.json"
    rows = [{**ROW, "config": [64, 64, 32, 4, 4, 8, 1, 0, 0, 0]}]
    monkeypatch.setattr(compile_report, "report", lambda *_: rows)
    assert compile_report.main(["--save", str(file)]) == 0
    assert compile_report.main(["--check", str(file)]) == 0
    rows = [{**rows[0], "registers": 170}]
    assert compile_report.main(["--check", str(file)]) == 1
    assert "is out of date; --save updates it" in capsys.readouterr().err


def test_tables_of_the_page_come_from_the_saved_report() -> None:
    other = {**ROW, "triton": "3.6.0", "registers": 170}
    result = {"rows": [ROW, {**ROW, "target": "sm_90"}], "others": [other]}
    table = kernels.compiled("sm_80", result).splitlines()
    assert len(table) == 3
    assert (
        "| tiles (paper) | bfloat16 | 64x64x32 | 4 | 4 | 168 | 0 | 32 KiB | 16 | 3 | 19% |"
        in (table[2])
    )
    told = kernels.other_compiler("sm_80", result)
    assert "Triton 3.7.1 -> 3.6.0: 1 of 1 differ." in told and "| 168 -> 170 |" in told


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        # From NVIDIA's occupancy calculator: limited by registers, shared memory, warps.
        ("sm_90", 128, 96 * 1024, 8, 2),
        ("sm_90", 129, 0, 8, 1),
        ("sm_90", 32, 113 * 1024, 4, 2),
        ("sm_90", 32, 114 * 1024, 4, 1),
        ("sm_80", 255, 0, 8, 1),
        ("sm_80", 24, 0, 8, 8),
        ("sm_89", 24, 0, 8, 6),
        ("sm_89", 24, 49 * 1024, 8, 2),
        ("gfx942", 128, 32 * 1024, 8, 2),
        ("gfx942", 256, 1024, 8, 1),
    ],
)
def test_resident_programs(
    target: str, registers: int, shared: int, warps: int, programs: int
) -> None:
    assert aot.resident_programs(aot.TARGETS[target], registers, shared, warps) == programs


#: `python -m negtome_fast.tuner.compile_report`, also in a checkout: `bench` makes it importable.
PROGRAM = (
    "import bench, sys; from negtome_fast.tuner import compile_report as report;"
    "sys.exit(report.main())"
)


def test_unknown_names_are_one_clear_line() -> None:
    with pytest.raises(ValueError, match="unknown sm_1; known: sm_80"):
        compile_report.report(targets=["sm_1"])
    with pytest.raises(ValueError, match="unknown mach; known: scale"):
        compile_report.report(kernels=["mach"])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--targets", "sm_1"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_without_triton_there_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for compile_some in (compile_report.report, compile_report.compile_all):
        with pytest.raises(RuntimeError, match="Triton is not installed"):
            compile_some()
    assert compile_report.main(["--targets", "sm_80"]) == 2
    assert "Triton is not installed" in capsys.readouterr().err
