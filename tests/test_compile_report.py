"""Every shipped launch configuration compiles well for every target; no GPU is needed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from negtome_fast.kernels import aot, tuning

DOCUMENT = Path(__file__).parents[1] / "docs" / "kernels.md"
ROW: dict[str, Any] = {
    "target": "sm_80",
    "kernel": "tiles",
    "variant": "paper",
    "dtype": "bfloat16",
    "config": [64, 64, 32, 4, 4, 8, 2, 0],
    "registers": 168,
    "spills": 0,
    "shared": 32768,
    "shared_limit": 166912,
    "matrix_instructions": 16,
    "narrow_offsets": 0,
    "programs": 3,
    "occupancy": 0.19,
    "error": None,
}


@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_shipped_configuration_compiles_well(target: str) -> None:
    # One test for each target, as compiling takes long: no two workers compile the same.
    rows = aot.report([target])
    # Triton's older wheels leave the last step for AMD to a linker of the machine.
    if all("ld.lld not found" in (row["error"] or "") for row in rows):
        pytest.skip(f"no linker for {target} on this machine")

    compiled = {(row["kernel"], row["dtype"], *row["config"]) for row in rows}
    shipped = {(kernel, dtype, *c) for kernel, dtype, c in tuning.shipped_configurations(target)}
    assert compiled == shipped
    by_descriptors = {tuple(r["config"]) for r in rows if "descriptors" in r["variant"]}
    assert by_descriptors == {c for *_, c in tuning.shipped_configurations(target) if c.DESCRIPTORS}

    # Neither failures, spills, too much shared memory, nor half precision without tensor cores.
    wrong = [row for row in rows if aot.problems(row)]
    assert not wrong, "\n" + aot.table(wrong)

    text = DOCUMENT.read_text(encoding="utf-8")
    if f"Triton {triton.__version__}" in text:  # another compiler gives another table
        command = "python -m negtome_fast.kernels.aot --write docs/kernels.md"
        assert aot.in_document(text, target, rows) == text, f"out of date; run {command}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"spills": 8}, ["spills 8"]),
        ({"shared": 10**6}, ["1000000 bytes of shared memory exceed 166912"]),
        ({"matrix_instructions": 0}, ["no tensor-core instruction"]),
        ({"dtype": "float32"}, ["fp32 rounded to TF32"]),
        ({"programs": 1}, ["1 programs fit a multiprocessor, not 2"]),
        ({"narrow_offsets": 3}, ["3 offsets of 32 bits into tokens"]),
        ({"error": "does not compile", "spills": 8}, ["does not compile"]),
    ],
)
def test_report_shows_what_is_wrong_with_a_row(change: dict[str, Any], expected: list[str]) -> None:
    assert aot.problems(ROW) == []
    row = {**ROW, **change}
    assert aot.problems(row) == expected
    assert "tiles (paper)" in aot.table([row]) and expected[0] in aot.table([row])


def test_table_of_one_target_is_replaced_in_the_document() -> None:
    text = "above\n<!-- begin: sm_80 -->\nold\n<!-- end: sm_80 -->\nbelow\n"
    new = aot.in_document(text, "sm_80", [ROW])
    assert new.startswith("above\n") and new.endswith("\nbelow\n") and "old" not in new
    assert (
        "| tiles (paper) | bfloat16 | 64x64x32 | 4 | 4 | 168 | 0 | 32 KiB | 16 | 3 | 19% |" in new
    )
    assert aot.in_document(new, "sm_80", [ROW]) == new
    assert aot.in_document(new, "sm_80", [{**ROW, "spills": 8}]) != new
    with pytest.raises(ValueError, match="no markers"):
        aot.in_document(text, "sm_90", [ROW])


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        # As NVIDIA's occupancy calculator has it: limited by registers, shared memory, warps.
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


#: As `python -m negtome_fast.kernels.aot`; importing `bench` makes a checkout importable.
PROGRAM = "import bench, sys; from negtome_fast.kernels import aot; sys.exit(aot.main())"


def test_unknown_names_are_one_clear_line() -> None:
    with pytest.raises(ValueError, match="unknown sm_1; known: sm_80"):
        aot.report(targets=["sm_1"])
    with pytest.raises(ValueError, match="unknown mach; known: scale"):
        aot.report(kernels=["mach"])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--targets", "sm_1"],
        cwd=Path(__file__).resolve().parent.parent,
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
    for compile_some in (aot.report, aot.compile_all):
        with pytest.raises(RuntimeError, match="Triton is not installed"):
            compile_some()
    assert aot.main(["--targets", "sm_80"]) == 2
    assert "Triton is not installed" in capsys.readouterr().err
