"""Operators to export, and the compilers that tests of exports use."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton

from helpers.device import DEVICE
from negtome_fast.integrations.export import Operator

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "helpers"
EXAMPLE = ROOT / "examples" / "export" / "negtome.cpp"
PAGE = ROOT / "docs" / "export.md"
BACKENDS = Path(triton.__file__).parent / "backends"
CUDA_INCLUDE, HIP_INCLUDE = BACKENDS / "nvidia" / "include", BACKENDS / "amd" / "include"
GXX = shutil.which("g++")
needs_compiler = pytest.mark.skipif(
    GXX is None or not (CUDA_INCLUDE / "cuda.h").is_file(), reason="needs g++ and cuda.h"
)
interpreted_only = pytest.mark.skipif(DEVICE == "cuda", reason="kernels are compiled here")

# Every target, dtype, reference, way of launching and choice at least once.
OPERATORS = {
    "sm_80": Operator("sm_80", "bf16", 64),
    "sm_80, fp16, in place, rows": Operator("sm_80", "fp16", 64, inplace=True, kind="rows"),
    "sm_80, fp32, odd channels": Operator("sm_80", "fp32", 40, kind="tiles", inplace=True),
    "sm_89, others": Operator("sm_89", "bf16", 64, "others", kind="tiles"),
    "sm_89, external, masks, rows": Operator(
        "sm_89", "bf16", 64, "external", reference_mask=True, source_mask=True, kind="rows"
    ),
    "sm_90": Operator("sm_90", "bf16", 3072),
    "sm_90, external, masks": Operator(
        "sm_90", "bf16", 64, "external", reference_mask=True, source_mask=True, kind="tiles"
    ),
    "sm_100, official, masks": Operator(
        "sm_100", "fp16", 64, matching="official", reference_mask=True, source_mask=True
    ),
    "sm_80, others, sum": Operator("sm_80", "fp32", 64, "others", combine="sum"),
    "gfx942, external, official, sum": Operator(
        "gfx942", "bf16", 64, "external", matching="official", combine="sum"
    ),
}


def description(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "negtome.json").read_text(encoding="utf-8"))


def compile_with(compiler: str, arguments: list[str]) -> None:
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def include_options(operator: Operator) -> list[str]:
    if operator.target.startswith("gfx"):
        return ["-D__HIP_PLATFORM_AMD__", "-isystem", str(HIP_INCLUDE)]
    return ["-isystem", str(CUDA_INCLUDE)]
