"""Compile every kernel for a target without a GPU, and read off what the compiler made of it.

    python -m negtome_fast.kernels.aot [--targets sm_90 gfx942] [--kernels tiles] [--json]
    python -m negtome_fast.kernels.aot --write docs/kernels.md      (--check docs/kernels.md)

Reports registers, spills, shared memory against the target's limit, matrix instructions, and how
many programs fit a multiprocessor. IEEE fp32 has no tensor-core path on NVIDIA: there the matching
kernels count 0 instructions, as they should. `report` runs this file in processes of their own,
because kernels that were imported under TRITON_INTERPRET=1 cannot be compiled any more.
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
    """A compilation target, and what limits how many programs run together on a multiprocessor.

    Bytes of shared memory for one program and for a multiprocessor, of which every program costs
    `shared_reserved` more than it asks for; warps and programs of a multiprocessor. (On gfx942 a
    multiprocessor is a compute unit, and a warp a wavefront.)
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
    "movable_ptr": "*u8",
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
    "step_size": "fp32",
    "tolerance": "fp32",
}
# What a launch specialises on: contiguous channels, everything else a multiple of 16.
_UNIT_STRIDES = ("stride_td", "stride_xd", "stride_rd", "stride_cd", "stride_od")
# The block of a descriptor holds these two sides.
_DESCRIPTORS = {"row_descriptor": "BLOCK_M", "column_descriptor": "BLOCK_N"}
# A pointer to tokens that is moved by an offset of 32 bits, in Triton's own language.
_NARROW = r"tt\.addptr [^\n]*!tt\.ptr<%s>[^\n]*, (?:tensor<[\dx]*i32|i32\b)"

MATCHING = ("rows", "tiles", "pairs")


def _constants(kernel: str, dtype: str, config: tuning.Config) -> dict[str, dict[str, Any]]:
    """The variants to compile `kernel` in, by name: compile-time constants.

    For bf16 what the pipelines launch (mode "first", in place, without masks) and the hardest
    cases; for the other dtypes one variant. The mode only changes which item is read, so it is not
    compiled in every combination.
    """
    rows: dict[str, Any] = {"BLOCK_M": config.BLOCK_M, "BLOCK_K": config.BLOCK_K}
    tile = {**rows, "BLOCK_N": config.BLOCK_N, "INTERPRETED": False}
    pipelines = {"MODE": "first", "INPLACE": True, "movable_ptr": None, "INTERPRETED": False}
    others = {"MODE": "others", "INPLACE": False, "INTERPRETED": False}
    if kernel == "scale":
        return {"mask": rows}
    if kernel in ("rows", "finish"):
        blocks = tile if kernel == "rows" else rows
        variants = {"first, in place": {**blocks, **pipelines}, "others": {**blocks, **others}}
    elif kernel in ("tiles", "pairs"):
        tile |= {"GROUP": config.GROUP, "row_descriptor": None, "column_descriptor": None}
        mode, pairs = ("others", True) if kernel == "pairs" else ("first", False)
        union = {**tile, "MODE": mode, "OFFICIAL": False, "PAIRS": pairs, "UNION": True}
        official = {**union, "OFFICIAL": True, "UNION": False}
        variants = {"paper": union, "official": official}
        if config.DESCRIPTORS:
            # What is left out here is an argument: a descriptor instead of None.
            described = {k: v for k, v in union.items() if k not in _DESCRIPTORS}
            variants = {"paper, descriptors": described, **variants}
    elif kernel == "nudge":
        block = {"BLOCK": config.BLOCK_K, "INTERPRETED": False}
        variants = {"cosine": {**block, "OBJECTIVE": "cosine"}}
        variants["squared"] = {**block, "OBJECTIVE": "squared"}
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


def _function(kernel: str) -> Any:
    from . import match, nudge, push, rows

    return {
        "scale": match.scale_kernel,
        "rows": rows.rows_kernel,
        "tiles": match.tile_kernel,
        "pairs": match.tile_kernel,
        "finish": push.finish_kernel,
        "resolve": match.resolve_kernel,
        "push": push.push_kernel,
        "nudge": nudge.nudge_kernel,
    }[kernel]


def _require_triton() -> None:
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
    """Compile one kernel for `target`; the result's `asm` holds its code in every stage.

    `divisible`: channels and strides are multiples of 16, as those of models are.
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
            signature[name] = f"tensordesc<{_POINTER[dtype][1:]}{block}>"
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
    if kernel in ("tiles", "pairs") and target.backend == "cuda":
        options |= config.cap()
    return triton.compile(
        ASTSource(function, signature, constexprs=values, attrs=attributes),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options=options,
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


def resident_programs(
    target: Target, registers: int, shared: int, num_warps: int, tensor_memory: int = 0
) -> int:
    """How many programs of a kernel run together on one multiprocessor of `target`, at most.

    registers of a thread, shared memory in bytes and, on sm_100, columns of tensor memory, each of
    one program. Registers are given out in groups of 8 a thread; a thread has at least one group.
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
    """Compile one variant for the target `name`; one row of the report (see `compile_all`)."""
    target = TARGETS[name]
    started = time.perf_counter()
    row: dict[str, Any] = {
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
        "programs": None,
        "occupancy": None,
        "error": None,
    }
    try:
        compiled = compile_kernel(kernel, dtype, config, constants, target)
    except Exception as error:  # a compiler may fail in any way; the row says how
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        cuda = target.backend == "cuda"
        row["registers"], row["spills"] = (_cuda_resources if cuda else _hip_resources)(compiled)
        row["shared"] = compiled.metadata.shared
        assembly = compiled.asm["ptx" if cuda else "amdgcn"]
        pattern = _MATRIX_INSTRUCTION[target.backend]
        row["matrix_instructions"] = len(pattern.findall(assembly))
        narrow = _NARROW % re.escape(_POINTER[dtype][1:].replace("fp", "f"))
        # fp32 tokens share their type with scales and similarities, whose offsets may be short;
        # nudge moves its pointers to the item by 64 bits once.
        wide = dtype == "float32" or kernel == "nudge"
        row["narrow_offsets"] = 0 if wide else len(re.findall(narrow, compiled.asm["ttir"]))
        if row["registers"] is not None:
            tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
            programs = resident_programs(
                target, row["registers"], row["shared"], config.num_warps, tensor_memory
            )
            row["programs"] = programs
            row["occupancy"] = round(programs * config.num_warps / target.warps, 2)
    row["seconds"] = round(time.perf_counter() - started, 2)
    return row


def compile_all(
    targets: Iterable[str] = tuple(TARGETS), kernels: Iterable[str] = tuning.KERNELS
) -> list[dict[str, Any]]:
    """Compile every shipped configuration; one row each. Needs kernels that are not interpreted.

    A row: target, kernel, variant, dtype, config (list of the fields of Config), registers, spills,
    shared, shared_limit, matrix_instructions, narrow_offsets (32-bit offsets into 2-byte tokens),
    programs (that fit a multiprocessor), occupancy (share of its warps), seconds, error (None, or
    the compiler's first line). Raises RuntimeError without Triton.
    """
    _require_triton()
    kernels = set(kernels)
    return [
        compile_row(name, kernel, dtype, config, variant, constants)
        for name in targets
        for kernel, dtype, config in tuning.shipped_configurations(name)
        if kernel in kernels
        for variant, constants in _constants(kernel, dtype, config).items()
    ]


# As `python -m`, but this package comes from where this process found it: in a checkout that is not
# installed `kernels/` lies beside the package that it belongs to, where no import looks.
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


def run_compiling(module: str, arguments: Sequence[str], given: str | None = None) -> str:
    """What `python -m module` prints, in a process whose kernels are not interpreted.

    Raises RuntimeError with the last line of its errors where it fails, and without Triton.
    """
    _require_triton()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    package, folder = str(__package__), str(Path(__file__).parent)
    command = [sys.executable, "-c", _RUN_MODULE, package, folder, module, *arguments]
    done = subprocess.run(
        command, env=environment, input=given, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"compiling the kernels ({' '.join(arguments)}) failed: {lines[-1]}")
    return done.stdout


def _in_process(arguments: Sequence[str], given: str | None = None) -> list[dict[str, Any]]:
    """What this file prints with `--json`, where kernels are not interpreted."""
    rows: list[dict[str, Any]] = json.loads(
        run_compiling(f"{__package__}.aot", ["--json", *arguments], given)
    )
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
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        parts = pool.map(
            lambda target: _in_process(["--targets", target, "--kernels", *kernels]), targets
        )
        return [row for rows in parts for row in rows]


def report_configurations(
    target: str, configurations: Sequence[tuple[str, str, tuning.Config]]
) -> list[dict[str, Any]]:
    """Rows for (kernel, dtype, config), shipped or not, each in its first variant; in their order.

    Compiled in as many processes as there are processors. Raises as `report`.
    """
    _require_triton()
    if target not in TARGETS:
        raise ValueError(f"unknown {target}; known: {', '.join(TARGETS)}")
    workers = max(1, min(os.cpu_count() or 1, len(configurations)))
    shares = [configurations[number::workers] for number in range(workers)]
    with ThreadPoolExecutor(max_workers=workers) as pool:
        parts = list(
            pool.map(
                lambda share: _in_process(["--targets", target, "--given"], json.dumps(share)),
                shares,
            )
        )
    return [parts[number % workers][number // workers] for number in range(len(configurations))]


def _compile_given(target: str, text: str) -> list[dict[str, Any]]:
    rows = []
    for kernel, dtype, fields in json.loads(text):
        config = tuning.Config(*fields)
        variant, constants = next(iter(_constants(kernel, dtype, config).items()))
        rows.append(compile_row(target, kernel, dtype, config, variant, constants))
    return rows


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with one row of the report; empty where the configuration may ship."""
    if row["error"]:
        return [row["error"]]
    found = []
    if row["spills"]:
        found.append(f"spills {row['spills']}")
    if row["shared"] > row["shared_limit"]:
        found.append(f"{row['shared']} bytes of shared memory exceed {row['shared_limit']}")
    if row["kernel"] in MATCHING:
        if row["dtype"] != "float32" and not row["matrix_instructions"]:
            found.append("no tensor-core instruction")
        resident = tuning.Config(*row["config"]).RESIDENT if row["kernel"] != "rows" else 1
        if row["programs"] is not None and row["programs"] < resident:
            found.append(f"{row['programs']} programs fit a multiprocessor, not {resident}")
        # Elsewhere matrix instructions are exact in fp32; on NVIDIA they would round to TF32.
        exact = row["dtype"] == "float32" and row["target"].startswith("sm_")
        if exact and row["matrix_instructions"]:
            found.append("fp32 rounded to TF32")
    if row["narrow_offsets"]:
        found.append(f"{row['narrow_offsets']} offsets of 32 bits into tokens")
    return found


_HEADER = (
    *("target", "kernel", "dtype", "M x N x K", "warps", "stages", "registers", "spills"),
    *("shared", "matrix", "programs", "occupancy", "verdict"),
)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row as text, in the order of the table's header."""
    config = tuning.Config(*row["config"])
    blocks = (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K)
    values = (
        row["target"],
        f"{row['kernel']} ({row['variant']})",
        row["dtype"],
        "x".join(str(block) for block in blocks if block),
        config.num_warps,
        config.num_stages,
        row["registers"],
        row["spills"],
        None if row["shared"] is None else f"{row['shared'] / KIB:.0f} KiB",
        row["matrix_instructions"],
        row["programs"],
        None if row["occupancy"] is None else f"{row['occupancy']:.0%}",
        "; ".join(problems(row)) or "ok",
    )
    return tuple("-" if value is None else str(value) for value in values)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The report as aligned text, one line a kernel and configuration."""
    lines = [_HEADER, *map(cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """The rows of one target as a Markdown table, without the target's column."""
    lines = [_HEADER[1:], ("---",) * (len(_HEADER) - 1), *(cells(row)[1:] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_document(text: str, target: str, rows: Iterable[dict[str, Any]]) -> str:
    """`text` with the table of `target` between its two markers replaced.

    Raises ValueError where the markers are missing.
    """
    begin, end = f"<!-- begin: {target} -->\n", f"<!-- end: {target} -->"
    if begin not in text or end not in text:
        raise ValueError(f"no markers '{begin.strip()}' and '{end}' in the document")
    before, rest = text.split(begin, 1)
    _, after = rest.split(end, 1)
    return f"{before}{begin}{markdown(rows)}\n{end}{after}"


def _update(path: Path, rows: list[dict[str, Any]], check: bool) -> int:
    """Write the tables of all targets in `rows` into a document, or say which are out of date."""
    text = path.read_text(encoding="utf-8")
    stale = []
    for target in dict.fromkeys(row["target"] for row in rows):
        new = in_document(text, target, [row for row in rows if row["target"] == target])
        if new != text:
            stale.append(target)
        text = new
    if check:
        if stale:
            print(f"{path} is out of date for {', '.join(stale)}", file=sys.stderr)
        return int(bool(stale))
    path.write_text(text, encoding="utf-8")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; exit code 1 where a configuration may not ship, 2 without Triton."""
    parser = argparse.ArgumentParser(prog="negtome_fast.kernels.aot", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", choices=tuning.KERNELS, default=tuning.KERNELS)
    parser.add_argument("--json", action="store_true", help="rows as JSON, always exit code 0")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into a document")
    parser.add_argument("--check", type=Path, metavar="FILE", help="exit code 1 where they differ")
    parser.add_argument("--given", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    document = options.write or options.check
    try:
        if options.given:
            rows = _compile_given(options.targets[0], sys.stdin.read())
        else:
            rows = compile_all(options.targets, options.kernels)
        if document:
            return _update(document, rows, check=options.write is None)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"negtome_fast.kernels.aot: error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(rows))
        return 0
    print(table(rows))
    return int(any(problems(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
