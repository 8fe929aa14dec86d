"""Rehearsals of the GPU suite from a bare checkout, with torch, triton, numpy and pytest alone.

A machine that is rented by the minute may have no more packages, and no network.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from helpers import bare_environment

pytest.importorskip("triton", reason="Triton is not installed")

from bench.gpu import full, smoke
from bench.timing.launches import KINDS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "numpy", "pytest")
LIMIT = "3000"
"""Seconds; enough for every stage on a busy machine."""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare_environment.build(tmp_path_factory.mktemp("bare") / "environment", *PACKAGES)


def environment() -> dict[str, str]:
    """Environment without the paths and settings of this process."""
    kept = ("HOME", "PATH", "TMPDIR", "LANG", "LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE")
    found = {name: os.environ[name] for name in kept if name in os.environ}
    return found | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def in_bare(python: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_holds_nothing_else(bare_python: Path) -> None:
    code = "import importlib.util as u; print([n for n in {} if u.find_spec(n)])"
    names = ["torch", "triton", "numpy", "pytest", "diffusers", "xdist", "packaging", "pip"]
    # It runs in another folder, because the checkout itself holds the package.
    done = subprocess.run(
        [str(bare_python), "-c", code.format([*names, "negtome_fast"])],
        cwd=bare_python.parent,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str([*PACKAGES, "packaging"])


def rehearsed(call: str, python: Path, out: Path) -> dict[str, Any]:
    """Stages of a rehearsal, which must end with exit code 0 and have all stages in order."""
    words = ["bench/gpu_suite.py", call, "--rehearse", "--limit", LIMIT, "--out", str(out)]
    done = in_bare(python, *words)
    log = out / f"{call}.log"
    said = done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    assert done.returncode == 0, said
    result = json.loads((out / f"{call}.json").read_text())
    stages = {"smoke": smoke.STAGES, "full": full.STAGES}[call]
    assert list(result["stages"]) == list(stages)
    assert not result["cut_short"] and result["rehearsal"]
    assert not any(stage["failed_here"] for stage in result["stages"].values())
    return result["stages"]


def measured(stage: dict[str, Any]) -> bool:
    """Return True if every shape of a benchmark has times."""
    cases = stage["result"]["cases"]
    return bool(cases) and all(case["times"]["ours"]["seconds"]["median"] > 0 for case in cases)


def test_smoke_is_rehearsed(bare_python: Path, tmp_path: Path) -> None:
    stages = rehearsed("smoke", bare_python, tmp_path)
    kinds = stages["kernels"]["kinds"]
    assert list(kinds) == list(KINDS)
    for kind in kinds.values():
        assert kind["complete"] and len(kind["checks"]) >= 2
    assert measured(stages["times"])
    assert all(shape["kernels"] for shape in stages["each"]["result"]["kernels_of"])
    assert stages["ncu"]["exit_code"] == 0


def test_full_is_rehearsed(bare_python: Path, tmp_path: Path) -> None:
    stages = rehearsed("full", bare_python, tmp_path)
    log = (tmp_path / "full.log").read_text()
    for kernel in ("fused", "tiles", "pairs", "push_from_keys"):
        assert f"8x1024x1280/2 bfloat16, {kernel}: 1 to measure" in log
    assert stages["tests"]["passed"] >= 1
    for name in ("tuned", "growth", "compiled"):
        assert measured(stages[name])
    missing = stages["tuned"]["rivals_skipped"]
    assert missing == {name: f"{name} is not installed" for name in ("flash-kmeans", "flashlib")}
    assert stages["end-to-end"]["skipped"] == "diffusers is not installed"
    assert stages["sanitizer"]["exit_code"] == 0
