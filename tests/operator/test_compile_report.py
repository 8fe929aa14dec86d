"""Every shipped launch configuration compiles well for every target; no GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from negtome_fast.kernels import aot, tuning
from negtome_fast.tuner import compile_report

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "kernels.md"
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
    text = DOCUMENT.read_text(encoding="utf-8")
    if f"compiled by Triton {triton.__version__}" in text:  # another compiler gives another table
        assert compile_report.documented(text, rows) == text, f"out of date; run {COMMAND}"


def assert_nothing_is_wrong(rows: list[dict[str, Any]]) -> None:
    # Neither failures, spills, too much shared memory, nor half precision without tensor cores.
    wrong = [row for row in rows if compile_report.problems(row)]
    assert not wrong, "\n" + compile_report.table(wrong)


def section(name: str) -> str:
    """Text of docs/kernels.md between two markers."""
    text = DOCUMENT.read_text(encoding="utf-8")
    return text.split(f"<!-- begin: {name} -->\n")[1].split("<!-- end")[0].rstrip("\n")


def test_the_other_triton_compiles_sm_90_well() -> None:
    """`make compile-check` compiles the other targets, which takes long."""
    if triton.__version__ == OTHER:
        pytest.skip(f"Triton {OTHER} is the installed one")
    if not (OTHER_FOLDER / "complete").is_file():
        pytest.skip(f"no Triton {OTHER} at hand: `make other-triton` downloads it")
    rows = compile_report.report(["sm_90"], triton=OTHER_FOLDER)
    assert {row["triton"] for row in rows} == {OTHER}
    assert_nothing_is_wrong(rows)
    # The table of the installed compiler is what the test above holds it to be.
    lines = [line.strip("| ").split(" | ") for line in section("sm_90").splitlines()[2:]]
    shown = [("sm_90", *line) for line in lines]
    found = [*map(compile_report.cells, rows)]
    version = re.search(r"compiled by Triton ([\d.]+)", DOCUMENT.read_text(encoding="utf-8"))
    assert version is not None
    told = compile_report.comparison(shown, found, f"{version[1]} -> {OTHER}")
    assert section(f"sm_90, Triton {OTHER}") == told, f"out of date; run {COMMAND}"


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


def test_tables_of_a_target_are_replaced_in_the_document() -> None:
    text = "above\n<!-- begin: sm_80 -->\nold\n<!-- end: sm_80 -->\nbelow\n"
    new = compile_report.documented(text, [ROW])
    assert new.startswith("above\n") and new.endswith("\nbelow\n") and "old" not in new
    assert (
        "| tiles (paper) | bfloat16 | 64x64x32 | 4 | 4 | 168 | 0 | 32 KiB | 16 | 3 | 19% |" in new
    )
    assert compile_report.documented(new, [ROW]) == new
    assert compile_report.documented(new, [{**ROW, "spills": 8}]) != new
    with pytest.raises(ValueError, match="no markers"):
        compile_report.documented(text, [{**ROW, "target": "sm_90"}])
    other = {**ROW, "triton": "3.6.0", "registers": 170}
    with pytest.raises(ValueError, match=r"begin: sm_80, Triton 3\.6\.0"):
        compile_report.documented(text, [ROW], [other])
    text += "<!-- begin: sm_80, Triton 3.6.0 -->\n<!-- end: sm_80, Triton 3.6.0 -->\n"
    both = compile_report.documented(text, [ROW], [other])
    assert "Triton 3.7.1 -> 3.6.0: 1 of 1 differ." in both and "| 168 -> 170 |" in both


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
