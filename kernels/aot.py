"""Compile a kernel for a target without a GPU, and measure the compiled code.

`compile_row` gives registers, spills, shared memory against the target's limit, matrix instructions
and the programs that fit a multiprocessor. On NVIDIA the matching kernels in fp32 have 0 matrix
instructions, as they should: tensor cores would round to TF32. `run_compiling` starts a process of
its own, because kernels that were imported under TRITON_INTERPRET=1 cannot be compiled any more.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import tuning


class Target(NamedTuple):
    """A compilation target, and the limits of a multiprocessor.

    On gfx942 a multiprocessor is a compute unit, and a warp is a wavefront.

    Attributes:
        backend, arch, warp_size: as Triton names the target.
        shared_limit: bytes of shared memory that one program may use.
        shared_total: bytes of a multiprocessor; a program takes `shared_reserved` beside its own.
        warps, programs: most warps and programs that run together.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    shared_total: int
    shared_reserved: int
    warps: int
    programs: int


KIB = 1024
TARGETS: dict[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 163 * KIB, 164 * KIB, KIB, 64, 32),
    "sm_89": Target("cuda", 89, 32, 99 * KIB, 100 * KIB, KIB, 48, 24),
    "sm_90": Target("cuda", 90, 32, 227 * KIB, 228 * KIB, KIB, 64, 32),
    "sm_100": Target("cuda", 100, 32, 227 * KIB, 228 * KIB, KIB, 64, 32),
    "gfx942": Target("hip", "gfx942", 64, 64 * KIB, 64 * KIB, 0, 32, 32),
}

_MATRIX_INSTRUCTION = {
    "cuda": re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"),
    "hip": re.compile(r"\bv_mfma_\w+"),
}
_POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}

# Argument types that do not follow the inputs' dtype.
_FIXED = {
    "mask_ptr": "*u8",
    "source_mask_ptr": "*u8",
    "scale_ptr": "*fp32",
    "x_scale_ptr": "*fp32",
    "reference_scale_ptr": "*fp32",
    "alpha_ptr": "*fp32",
    "threshold_ptr": "*fp32",
    "similarity_ptr": "*fp32",
    "match_similarity_ptr": "*fp32",
    "key_ptr": "*i64",
    "index_ptr": "*i64",
    "match_index_ptr": "*i64",
    "pushed_ptr": "*i64",
    "desired_ptr": "*fp32",
    "undesired_ptr": "*fp32",
    "beta_ptr": "*fp32",
    "radius_ptr": "*fp32",
    "distance_ptr": "*fp32",
    "trace_ptr": "*fp32",
    "taken_ptr": "*i64",
    "reason_ptr": "*i64",
    "tile_code": "i64",
    "band_code": "i64",
    "tail_code": "i64",
    "product_code": "i64",
    "circle_code": "i64",
    "step_size": "fp32",
    "tolerance": "fp32",
    "centre_ptr": "*fp32",
    "values_ptr": "*i8",
    "row_values_ptr": "*i8",
    "column_values_ptr": "*i8",
    "row_values_descriptor": "*i8",
    "column_values_descriptor": "*i8",
    "stats_ptr": "*fp32",
    "row_stats_ptr": "*fp32",
    "column_stats_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "blocks_ptr": "*fp32",
    "upper_ptr": "*fp32",
    "lower_ptr": "*i32",
    "counts_ptr": "*i32",
    "listed_ptr": "*i32",
    "tasks_ptr": "*i32",
    "along_error": "fp32",
}
# Arguments that are numbers with NUMBERS, and pointers without.
_NUMBERS = ("alpha_ptr", "threshold_ptr")
# A launch specialises on contiguous channels: these strides are compiled in as 1.
_UNIT_STRIDES = ("stride_td", "stride_xd", "stride_rd", "stride_cd", "stride_od")
# Descriptors, and the rows of their blocks.
_DESCRIPTORS = {"row_descriptor": "BLOCK_M", "column_descriptor": "BLOCK_N"}
_DESCRIPTORS |= {"row_values_descriptor": "BLOCK_M", "column_values_descriptor": "BLOCK_N"}
# An offset of 32 bits into tokens, in Triton's IR.
_NARROW = r"tt\.addptr [^\n]*!tt\.ptr<%s>[^\n]*, (?:tensor<[\dx]*i32|i32\b)"
# A maximum that returns NaN if one operand is NaN. best_of needs maxima that pass over NaN.
_NAN_MAXIMUM = re.compile(r"\bmax\.(?:ftz\.)?NaN\b")


def variants_of(kernel: str, dtype: str, config: tuning.Config) -> dict[str, dict[str, Any]]:
    """Compile-time constants of the variants of `kernel` to compile, by name.

    bf16 has the variant that pipelines launch (mode "first", in place, without masks) and the
    hardest cases; other dtypes have one variant. Not every mode is compiled: the mode only changes
    which item is read.
    """
    rows: dict[str, Any] = {"BLOCK_M": config.BLOCK_M, "BLOCK_K": config.BLOCK_K}
    tile = {**rows, "BLOCK_N": config.BLOCK_N, "INTERPRETED": False}
    pipelines = {"MODE": "first", "NUMBERS": True, "INPLACE": True, "source_mask_ptr": None}
    pipelines["INTERPRETED"] = False
    others = {"MODE": "others", "NUMBERS": False, "INPLACE": False, "INTERPRETED": False}
    if kernel == "scale":
        return {"mask": rows}
    if kernel in ("fused", "push_from_keys"):
        blocks = tile if kernel == "fused" else rows
        variants = {"first, in place": {**blocks, **pipelines}, "others": {**blocks, **others}}
    elif kernel in ("tiles", "pairs"):
        tile |= {"GROUP_M": config.GROUP_M, "FLATTEN": bool(config.FLATTEN)}
        tile |= {"row_descriptor": None, "column_descriptor": None}
        mode, pairs = ("others", True) if kernel == "pairs" else ("first", False)
        union = {**tile, "MODE": mode, "OFFICIAL": False, "PAIRS": pairs, "UNION": True}
        official = {**union, "OFFICIAL": True, "UNION": False}
        variants = {"paper": union, "official": official}
        if config.DESCRIPTORS:
            # Without the constant None a descriptor is an argument.
            described = {k: v for k, v in union.items() if k not in _DESCRIPTORS}
            variants = {"paper, descriptors": described, **variants}
    elif kernel == "nudge":
        block = {"BLOCK": config.BLOCK_K, "INTERPRETED": False}
        variants = {"cosine": {**block, "OBJECTIVE": "cosine"}}
        variants["squared"] = {**block, "OBJECTIVE": "squared"}
    elif kernel in tuning.COARSE:
        variants = _coarse_constants(kernel, config)
    elif kernel == "resolve":
        common = {**rows, "MODE": "others"}
        variants = {"official": {**common, "OFFICIAL": True}}
        variants["paper"] = {**common, "OFFICIAL": False}
    else:
        variants = {"nearest": {**rows, **others, "SUM": False}}
        variants["sum"] = {**rows, **others, "SUM": True}
    if dtype == "bfloat16":
        return variants
    first = next(iter(variants))
    return {first: variants[first]}


def _coarse_constants(kernel: str, config: tuning.Config) -> dict[str, dict[str, Any]]:
    """Variants of the kernels of kind "coarse", as `variants_of`."""
    rows: dict[str, Any] = {"BLOCK_M": config.BLOCK_M}
    if kernel == "centre":
        return {"sample": {**rows, "BLOCK_K": config.BLOCK_K}}
    if kernel == "round":
        block = {**rows, "BLOCK_D": config.BLOCK_K, "MODE": "first"}
        references = {**block, "lower_ptr": None, "counts_ptr": None}
        return {"sources": {**block, "scale_ptr": None}, "references": references}
    if kernel == "bias":
        return {"columns": {"BLOCK_N": config.BLOCK_N, "BLOCK_K": config.BLOCK_K}}
    blocks = {**rows, "BLOCK_N": config.BLOCK_N}
    if kernel == "select":
        return {"lists": {**blocks, "TILE": config.BLOCK_M}}
    blocks |= {"BLOCK_K": config.BLOCK_K, "MODE": "first", "INTERPRETED": False}
    if kernel == "score":
        return {"listed": {**blocks, "SPLIT": 2}}
    blocks["GROUP_M"] = config.GROUP_M
    pointers = {**blocks, "row_values_descriptor": None, "column_values_descriptor": None}
    return {"descriptors": blocks} if config.DESCRIPTORS else {"pointers": pointers}


def _function(kernel: str) -> Any:
    from . import coarse, coarse_scores, fused, match, nudge, push

    if kernel in tuning.COARSE:
        module = coarse_scores if kernel in ("select", "score") else coarse
        return getattr(module, f"{kernel}_kernel")
    return {
        "scale": match.scale_kernel,
        "fused": fused.fused_kernel,
        "tiles": match.tiled_match_kernel,
        "pairs": match.tiled_match_kernel,
        "push_from_keys": push.push_from_keys_kernel,
        "resolve": match.resolve_kernel,
        "push": push.push_kernel,
        "nudge": nudge.nudge_kernel,
    }[kernel]


def require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed; the kernels cannot be compiled without it")


def compile_kernel(
    kernel: str,
    dtype: str,
    config: tuning.Config,
    constants: dict[str, Any],
    target: Target,
    divisible: bool = True,
) -> Any:
    """Compile one kernel for `target`; `asm` of the result holds the code of every stage.

    divisible: channels and strides are multiples of 16, as in models.

    Raises:
        RuntimeError: the kernels were imported under TRITON_INTERPRET.
    """
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
        elif name in _DESCRIPTORS:
            block = [1, constants[_DESCRIPTORS[name]], constants["BLOCK_K"]]
            signature[name] = f"tensordesc<{_FIXED.get(name, _POINTER[dtype])[1:]}{block}>"
        elif name in _NUMBERS and values.get("NUMBERS"):
            signature[name] = "fp32"
        elif name.endswith("_ptr"):
            signature[name] = _FIXED.get(name, _POINTER[dtype])
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in _FIXED:
            signature[name] = _FIXED[name]
        else:
            signature[name] = "i32"
            if divisible and not parameter.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if kernel in ("tiles", "pairs", "bound", "score") and target.backend == "cuda":
        options |= config.cap()
    return triton.compile(
        ASTSource(function, signature, constexprs=values, attrs=attributes),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options=options,
    )


def _cuda_resources(compiled: Any) -> tuple[int | None, int | None]:
    """Registers a thread, and bytes of stack and local memory, by cuobjdump; None without it."""
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

    Spilled scalar registers do not count: they move to lanes of vector registers, not to memory.
    """
    found = dict(re.findall(r"^\s*-?\s*\.(\w+):\s+(\d+)\s*$", compiled.asm["amdgcn"], re.MULTILINE))
    spills = ("vgpr_spill_count", "private_segment_fixed_size")
    return int(found["vgpr_count"]), sum(int(found[name]) for name in spills)


def resident_programs(
    target: Target, registers: int, shared: int, num_warps: int, tensor_memory: int = 0
) -> int:
    """Most programs of a kernel that run together on one multiprocessor of `target`.

    registers: of a thread, which gets them in groups of 8, at least one group. shared: bytes of a
    program. tensor_memory: columns of a program, on sm_100.
    """
    rounded = max(-(-registers // 8) * 8, 8)
    if target.backend == "hip":
        # Four SIMDs of 512 registers a lane; each of them runs at most 8 wavefronts.
        by_registers = 4 * min(512 // rounded, 8) // num_warps
    else:
        by_registers = 65536 // (rounded * 32 * num_warps)
    limits = [by_registers, target.warps // num_warps, target.programs]
    if shared + target.shared_reserved:
        limits.append(target.shared_total // (shared + target.shared_reserved))
    if tensor_memory:
        limits.append(512 // tensor_memory)
    return min(limits)


def compile_row(
    name: str,
    kernel: str,
    dtype: str,
    config: tuning.Config,
    variant: str,
    constants: dict[str, Any],
) -> dict[str, Any]:
    """Compile one variant for the target `name`; returns a row of the report, see `row_of`."""
    return row_of(
        name,
        kernel,
        dtype,
        config,
        variant,
        lambda: compile_kernel(kernel, dtype, config, constants, TARGETS[name]),
    )


def row_of(
    name: str,
    kernel: str,
    dtype: str,
    config: tuning.Config,
    variant: str,
    compiled: Callable[[], Any],
) -> dict[str, Any]:
    """One row of the report, on the code that `compiled` returns or on its failure to compile.

    A row: triton (the compiler's version), target, kernel, variant, dtype, config (list of the
    fields of Config), registers, spills, shared, shared_limit, matrix_instructions, narrow_offsets
    (32-bit offsets into 2-byte tokens), nan_maxima (maxima that are NaN where one operand is),
    programs (that fit a multiprocessor), occupancy (share of its warps), seconds, error (None, or
    the compiler's first line).
    """
    import triton

    target = TARGETS[name]
    started = time.perf_counter()
    row: dict[str, Any] = {
        "triton": triton.__version__,
        "target": name,
        "kernel": kernel,
        "variant": variant,
        "dtype": dtype,
        "config": list(config),
        "registers": None,
        "spills": None,
        "shared": None,
        "shared_limit": target.shared_limit,
        "matrix_instructions": None,
        "narrow_offsets": None,
        "nan_maxima": None,
        "programs": None,
        "occupancy": None,
        "error": None,
    }
    try:
        _examine(row, compiled(), target, config.num_warps)
    except Exception as error:  # a compiler may fail in any way; the row says how
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    row["seconds"] = round(time.perf_counter() - started, 2)
    return row


def _examine(row: dict[str, Any], compiled: Any, target: Target, num_warps: int) -> None:
    """Write the figures of compiled code into `row`."""
    cuda = target.backend == "cuda"
    row["registers"], row["spills"] = (_cuda_resources if cuda else _hip_resources)(compiled)
    row["shared"] = compiled.metadata.shared
    assembly = compiled.asm["ptx" if cuda else "amdgcn"]
    pattern = _MATRIX_INSTRUCTION[target.backend]
    row["matrix_instructions"] = len(pattern.findall(assembly))
    narrow = _NARROW % re.escape(_POINTER[row["dtype"]][1:].replace("fp", "f"))
    # Not counted for fp32, whose tokens share their type with scales, which may have short offsets;
    # nor for nudge, which first moves its pointers to the item by 64 bits.
    wide = row["dtype"] == "float32" or row["kernel"] == "nudge"
    row["narrow_offsets"] = 0 if wide else len(re.findall(narrow, compiled.asm["ttir"]))
    row["nan_maxima"] = len(_NAN_MAXIMUM.findall(assembly)) if cuda else 0
    if row["registers"] is not None:
        tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
        programs = resident_programs(
            target, row["registers"], row["shared"], num_warps, tensor_memory
        )
        row["programs"] = programs
        row["occupancy"] = round(programs * num_warps / target.warps, 2)


# `python -m`, with this package from the place where this process found it. In a checkout that is
# not installed, `kernels/` lies beside the package that it belongs to, where no import finds it.
_RUN_MODULE = """
import importlib.util, runpy, sys
package, folder, module = sys.argv[1:4]
del sys.argv[1:4]
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == package:
            return importlib.util.spec_from_file_location(
                name, folder + "/__init__.py", submodule_search_locations=[folder]
            )
sys.meta_path.insert(0, Finder)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def run_compiling(
    module: str, arguments: Sequence[str], given: str | None = None, triton: Path | None = None
) -> str:
    """Run `python -m module` in a process whose kernels are not interpreted; returns its output.

    given: text of its standard input. triton: a folder with the Triton to compile with; default:
    the installed one.

    Raises:
        RuntimeError: Triton is not installed, or the process failed; holds its last line.
    """
    require_triton()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folders = [str(triton.resolve())] if triton else []
    environment["PYTHONPATH"] = os.pathsep.join([*folders, *(path for path in sys.path if path)])
    package, folder = str(__package__), str(Path(__file__).parent)
    command = [sys.executable, "-c", _RUN_MODULE, package, folder, module, *arguments]
    done = subprocess.run(
        command, env=environment, input=given, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"compiling the kernels ({' '.join(arguments)}) failed: {lines[-1]}")
    return done.stdout
