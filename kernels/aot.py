"""Compile every kernel for a target without a GPU, and read off what the compiler made of it.

    python -m negtome_fast.kernels.aot [--targets sm_90 gfx942] [--kernels fused] [--json]

Reports registers, spills, shared memory against the target's limit, and matrix instructions. IEEE
fp32 has no tensor-core path on NVIDIA: there the matching kernels count 0 instructions, as they
should. `report` runs this file in processes of their own, because kernels that were imported under
TRITON_INTERPRET=1 cannot be compiled any more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from . import tuning


class Target(NamedTuple):
    """A compilation target and the shared memory, in bytes, that one program may use on it."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS: dict[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}

_MATRIX_INSTRUCTION = {
    "cuda": re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"),
    "hip": re.compile(r"\bv_mfma_\w+"),
}
_POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}

# Argument types that do not follow the inputs' dtype.
_FIXED = {
    "mask_ptr": "*u8",
    "movable_ptr": "*u8",
    "scale_ptr": "*fp32",
    "x_scale_ptr": "*fp32",
    "reference_scale_ptr": "*fp32",
    "alpha_ptr": "*fp32",
    "threshold_ptr": "*fp32",
    "similarity_ptr": "*fp32",
    "match_similarity_ptr": "*fp32",
    "index_ptr": "*i64",
    "match_index_ptr": "*i64",
    "pushed_ptr": "*i64",
}
# What a launch specialises on: contiguous channels, everything else a multiple of 16.
_UNIT_STRIDES = ("stride_td", "stride_xd", "stride_rd", "stride_od")


# What the rows of the report say about the constants of a kernel.
_OPTIONS = ("MODE", "OFFICIAL", "SUM", "INPLACE")


def _constants(kernel: str, dtype: str, config: tuning.Config) -> list[dict[str, Any]]:
    """The sets of compile-time constants to compile `kernel` with, one dict each.

    The hardest case of every kernel (mode "others", with masks), what the pipelines launch (mode
    "first", in place, without masks), and in bf16 the modes that are left. The mode only changes
    which item is read, so it is not compiled in every combination.
    """
    blocks = {"BLOCK_M": config.BLOCK_M, "BLOCK_K": config.BLOCK_K}
    tile = {**blocks, "BLOCK_N": config.BLOCK_N, "INTERPRETED": False}
    others = {"MODE": "others", "INPLACE": False}
    pipelines = {"MODE": "first", "INPLACE": True, "movable_ptr": None}
    if kernel == "scale":
        return [blocks]
    if kernel == "match":
        chosen = [{"MODE": "others", "OFFICIAL": False}, {"MODE": "others", "OFFICIAL": True}]
        if dtype == "bfloat16":
            chosen.append({"MODE": "first", "OFFICIAL": True})
            chosen.append({"MODE": "external", "OFFICIAL": False})
        return [{**tile, **constants} for constants in chosen]
    if kernel == "fused":
        chosen = [others, pipelines]
        if dtype == "bfloat16":
            chosen.append({"MODE": "external", "INPLACE": False})
        return [{**tile, **constants} for constants in chosen]
    push = {**blocks, "INTERPRETED": False}
    return [
        {**push, **others, "SUM": False},
        {**push, **others, "SUM": True},
        {**push, **pipelines, "SUM": False},
    ]


def _function(kernel: str) -> Any:
    from . import match, push

    return {
        "scale": match.scale_kernel,
        "match": match.match_kernel,
        "fused": match.fused_kernel,
        "push": push.push_kernel,
    }[kernel]


def _require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed; the kernels cannot be compiled without it")


def compile_kernel(
    kernel: str, dtype: str, config: tuning.Config, constants: dict[str, Any], target: Target
) -> Any:
    """Compile one kernel for `target`; the result's `asm` holds its code in every stage."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = _function(kernel)
    if not isinstance(function, triton.runtime.JITFunction):
        raise RuntimeError("kernels imported under TRITON_INTERPRET cannot be compiled; unset it")
    values = dict(constants)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(function.params):
        name = parameter.name
        if name in _UNIT_STRIDES:
            values[name] = 1
        if name in values:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = _FIXED.get(name, _POINTER[dtype])
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if not parameter.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(function, signature, constexprs=values, attrs=attributes),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def _cuda_resources(compiled: Any) -> tuple[int | None, int | None]:
    """Registers per thread and bytes of stack and local memory, by cuobjdump; None without it."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.is_file():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found.get("REG"), found.get("STACK", 0) + found.get("LOCAL", 0)


def _hip_resources(compiled: Any) -> tuple[int | None, int | None]:
    """Vector registers, and spilled vector registers plus scratch bytes, from the metadata.

    Spilled scalar registers do not count: they go to lanes of vector registers, not to memory.
    """
    found = dict(re.findall(r"^\s*-?\s*\.(\w+):\s+(\d+)\s*$", compiled.asm["amdgcn"], re.MULTILINE))
    spills = ("vgpr_spill_count", "private_segment_fixed_size")
    return int(found["vgpr_count"]), sum(int(found[name]) for name in spills)


def compile_all(
    targets: Iterable[str] = tuple(TARGETS), kernels: Iterable[str] = tuning.KERNELS
) -> list[dict[str, Any]]:
    """Compile every shipped configuration; one row each. Needs kernels that are not interpreted.

    A row: target, kernel, dtype, config (list of five), constants, registers, spills, shared,
    shared_limit, matrix_instructions, seconds, error (None, or the compiler's first line).
    Raises RuntimeError without Triton.
    """
    _require_triton()
    rows = []
    kernels = set(kernels)
    for name in targets:
        target = TARGETS[name]
        for kernel, dtype, config in tuning.shipped_configurations(name):
            if kernel not in kernels:
                continue
            for constants in _constants(kernel, dtype, config):
                started = time.perf_counter()
                row: dict[str, Any] = {
                    "target": name,
                    "kernel": kernel,
                    "dtype": dtype,
                    "config": list(config),
                    "constants": {k: v for k, v in constants.items() if k in _OPTIONS},
                    "registers": None,
                    "spills": None,
                    "shared": None,
                    "shared_limit": target.shared_limit,
                    "matrix_instructions": None,
                    "error": None,
                }
                try:
                    compiled = compile_kernel(kernel, dtype, config, constants, target)
                except Exception as error:  # a compiler may fail in any way; the row says how
                    row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                else:
                    cuda = target.backend == "cuda"
                    resources = _cuda_resources if cuda else _hip_resources
                    row["registers"], row["spills"] = resources(compiled)
                    row["shared"] = compiled.metadata.shared
                    assembly = compiled.asm["ptx" if cuda else "amdgcn"]
                    pattern = _MATRIX_INSTRUCTION[target.backend]
                    row["matrix_instructions"] = len(pattern.findall(assembly))
                row["seconds"] = round(time.perf_counter() - started, 2)
                rows.append(row)
    return rows


def report(
    targets: Sequence[str] | None = None, kernels: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """`compile_all`, a process for each target; so it also works where kernels are interpreted.

    Raises ValueError for an unknown target or kernel, RuntimeError without Triton or if a process
    fails.
    """
    _require_triton()
    targets = list(TARGETS) if targets is None else list(targets)
    kernels = list(tuning.KERNELS) if kernels is None else list(kernels)
    for names, known in ((targets, tuple(TARGETS)), (kernels, tuning.KERNELS)):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)

    def compile_target(target: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", f"{__package__}.aot", "--json"]
        command += ["--targets", target, "--kernels", *kernels]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise RuntimeError(f"compiling the kernels for {target} failed: {lines[-1]}")
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return [row for rows in pool.map(compile_target, targets) for row in rows]


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with one row of the report; empty where the configuration may ship."""
    if row["error"]:
        return [row["error"]]
    found = []
    if row["spills"]:
        found.append(f"spills {row['spills']}")
    if row["shared"] > row["shared_limit"]:
        found.append(f"{row['shared']} bytes of shared memory exceed {row['shared_limit']}")
    matches = row["kernel"] in ("match", "fused")
    if matches and row["dtype"] != "float32" and not row["matrix_instructions"]:
        found.append("no tensor-core instruction")
    return found


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The report as aligned text, one line a kernel and configuration."""
    header = ("target", "kernel", "dtype", "M x N x K", "warps", "stages", "registers", "spills")
    lines: list[tuple[str, ...]] = [(*header, "shared", "matrix", "verdict")]
    for row in rows:
        block_m, block_n, block_k, warps, stages = row["config"]
        options = [
            value if isinstance(value, str) else key.lower()
            for key, value in row["constants"].items()
            if value
        ]
        cells = (
            row["target"],
            "+".join([row["kernel"], *options]),
            row["dtype"],
            "x".join(str(block) for block in (block_m, block_n, block_k) if block),
            warps,
            stages,
            row["registers"],
            row["spills"],
            None if row["shared"] is None else f"{row['shared'] / 1024:.0f} KiB",
            row["matrix_instructions"],
            "; ".join(problems(row)) or "ok",
        )
        lines.append(tuple("-" if cell is None else str(cell) for cell in cells))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; exit code 1 where a configuration may not ship, 2 without Triton."""
    parser = argparse.ArgumentParser(prog="negtome_fast.kernels.aot", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", choices=tuning.KERNELS, default=tuning.KERNELS)
    parser.add_argument("--json", action="store_true", help="rows as JSON, always exit code 0")
    options = parser.parse_args(arguments)
    try:
        rows = compile_all(options.targets, options.kernels)
    except RuntimeError as error:
        print(f"negtome_fast.kernels.aot: error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(rows))
        return 0
    print(table(rows))
    return int(any(problems(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
