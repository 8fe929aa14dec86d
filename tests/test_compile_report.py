"""Every shipped launch configuration compiles well for every target; no GPU is needed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from negtome_fast.kernels import aot, tuning

ROW: dict[str, Any] = {
    "target": "sm_80",
    "kernel": "fused",
    "dtype": "bfloat16",
    "config": [64, 64, 32, 4, 4],
    "constants": {"MODE": "first", "INPLACE": True},
    "registers": 168,
    "spills": 0,
    "shared": 32768,
    "shared_limit": 166912,
    "matrix_instructions": 16,
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
    fused = {tuple(row["constants"].values()) for row in rows if row["kernel"] == "fused"}
    assert fused == {("others", False), ("first", True), ("external", False)}

    # Neither failures, spills, too much shared memory, nor half precision without tensor cores.
    wrong = [row for row in rows if aot.problems(row)]
    assert not wrong, "\n" + aot.table(wrong)
    if target.startswith("sm_"):
        # Elsewhere matrix instructions are exact in fp32; these would round to TF32.
        rounded = [r for r in rows if r["dtype"] == "float32" and r["matrix_instructions"]]
        assert not rounded, "\n" + aot.table(rounded)


def test_report_shows_what_is_wrong_with_a_row() -> None:
    assert aot.problems(ROW) == []
    row = {**ROW, "spills": 8, "shared": 10**6}
    assert aot.problems(row) == ["spills 8", "1000000 bytes of shared memory exceed 166912"]
    assert aot.problems({**ROW, "matrix_instructions": 0}) == ["no tensor-core instruction"]
    assert aot.problems({**row, "error": "does not compile"}) == ["does not compile"]
    assert "fused+first+inplace" in aot.table([row]) and "spills 8" in aot.table([row])


def test_unknown_names_are_one_clear_line() -> None:
    with pytest.raises(ValueError, match="unknown sm_1; known: sm_80"):
        aot.report(targets=["sm_1"])
    with pytest.raises(ValueError, match="unknown mach; known: scale"):
        aot.report(kernels=["mach"])
    done = subprocess.run(
        [sys.executable, "-m", "negtome_fast.kernels.aot", "--targets", "sm_1"],
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
