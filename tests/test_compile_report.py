"""Every shipped launch configuration compiles well for every target; no GPU is needed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from negtome_fast.kernels import aot, tuning

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def reports() -> Rows:
    return aot.report()


@pytest.fixture(params=aot.TARGETS)
def rows(request: pytest.FixtureRequest, reports: Rows) -> Rows:
    rows = [row for row in reports if row["target"] == request.param]
    # Triton's older wheels leave the last step for AMD to a linker of the machine.
    if all("ld.lld not found" in (row["error"] or "") for row in rows):
        pytest.skip(f"no linker for {request.param} on this machine")
    return rows


def summary(rows: Rows) -> str:
    return "\n" + aot.table(rows)


def test_every_shipped_configuration_compiles(rows: Rows) -> None:
    assert not (failed := [row for row in rows if row["error"]]), [row["error"] for row in failed]
    compiled = {(row["kernel"], row["dtype"], *row["config"]) for row in rows}
    target = rows[0]["target"]
    shipped = {(kernel, dtype, *c) for kernel, dtype, c in tuning.shipped_configurations(target)}
    assert compiled == shipped


def test_nothing_spills(rows: Rows) -> None:
    if any(row["spills"] is None for row in rows):
        pytest.skip("Triton came without cuobjdump")
    assert not (spilling := [row for row in rows if row["spills"]]), summary(spilling)


def test_shared_memory_suffices(rows: Rows) -> None:
    over = [row for row in rows if row["shared"] > row["shared_limit"]]
    assert not over, summary(over)


def test_half_precision_matching_uses_tensor_cores(rows: Rows) -> None:
    halves = [r for r in rows if r["kernel"] in ("match", "fused") and r["dtype"] != "float32"]
    assert halves
    without = [row for row in halves if not row["matrix_instructions"]]
    assert not without, summary(without)


def test_single_precision_matching_is_not_rounded_to_tf32(rows: Rows) -> None:
    if not rows[0]["target"].startswith("sm_"):
        pytest.skip("matrix instructions of this target are exact in fp32")
    rounded = [r for r in rows if r["dtype"] == "float32" and r["matrix_instructions"]]
    assert not rounded, summary(rounded)


def test_report_shows_what_is_wrong_with_a_row(reports: Rows) -> None:
    row = {**reports[0], "spills": 8, "shared": 10**6}
    assert aot.problems(row) == ["spills 8", f"1000000 bytes of shared memory exceed {166912}"]
    assert "spills 8" in aot.table([row])
    assert aot.problems({**row, "error": "does not compile"}) == ["does not compile"]


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
