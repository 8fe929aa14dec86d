"""Compiles what the compile report leaves out of the nudging kernel: "paper", and no trace.

Run by test_nudge.py in a process of its own: kernels that were imported to be interpreted cannot
be compiled any more.
"""

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Where the project is not installed, importing `bench` makes the kernels importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bench  # noqa: F401
from negtome_fast.kernels.nudge import nudge_kernel

TARGETS = (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64))


def compile_for(target: GPUTarget, objective: str, dtype: str, traced: bool) -> None:
    constants = {"OBJECTIVE": objective, "INTERPRETED": False, "BLOCK": 4096}
    if not traced:
        constants["trace_ptr"] = None
    types = {"latents_ptr": dtype, "out_ptr": dtype, "taken_ptr": "*i64", "reason_ptr": "*i64"}
    scalars = {"step_size": "fp32", "tolerance": "fp32"}
    signature = {}
    for name in (parameter.name for parameter in nudge_kernel.params):
        default = "*fp32" if name.endswith("_ptr") else scalars.get(name, "i32")
        signature[name] = "constexpr" if name in constants else types.get(name, default)
    places = list(signature)
    source = ASTSource(
        nudge_kernel, signature, {(places.index(name),): v for name, v in constants.items()}
    )
    triton.compile(source, target=target, options={"num_warps": 8})


if __name__ == "__main__":
    for target in TARGETS:
        for objective in ("paper", "squared", "cosine"):
            compile_for(target, objective, "*bf16", True)
            compile_for(target, objective, "*fp32", False)
            print(target.arch, objective)
