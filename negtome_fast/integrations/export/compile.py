"""Process that compiles the kernels of operators and writes the files of their exports.

Reads `[[fields of Operator, folder], ...]` as JSON from its standard input, and prints the paths of
the files as JSON: a list for each operator.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ... import __version__
from ...kernels import aot
from .header import render
from .kernel_launches import KernelLaunch, launches
from .operator import Operator
from .run import DESCRIPTION

HEADER = "negtome.h"
SCHEMA = 1
#: Meaning of the names in grids and arguments; a part of every description.
SIZES = {
    "B": "items",
    "N": "tokens",
    "M": "reference tokens; N unless the reference is external",
    "P": "reference items; B unless the reference is external",
    "item_step": "items of a group for reference first, else 1",
    "products": "pairs of a source and a reference item that are multiplied",
    "first_product, first_item": "0: a launch of the whole problem",
    "..._code": "negtome_reciprocal (see the header) of a divisor; tile: tiles of a "
    "product; band: GROUP_M times the blocks of columns; tail: blocks of rows after the "
    "last whole GROUP_M, or 1; product: products of a group (reference first, others), or "
    "references (external); circle: items of a group",
    "multiprocessors": "of the device",
}

#: Pointers that Triton appends to the arguments of every kernel; null if it needs no such memory.
SCRATCH = ("global_scratch", "profile_scratch")
_TYPES = {"i32": "int32", "i64": "int64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_TYPES |= {"u8": "uint8"}


def _argument(name: str, kind: str, divisible: bool) -> dict[str, Any]:
    """One entry of the description's arguments."""
    pointer = kind.startswith("*")
    entry: dict[str, Any] = {"name": name, "type": "pointer" if pointer else _TYPES[kind]}
    if pointer:
        entry |= {"to": _TYPES[kind[1:]], "bytes": 8}
    else:
        entry["bytes"] = 8 if kind == "i64" else 4
    # The caller guarantees divisibility: of a pointer's address, of a number's value.
    return entry | ({"multiple_of": 16} if divisible else {})


def describe(launch: KernelLaunch, compiled: Any, file: str) -> dict[str, Any]:
    """One kernel of the description: its file, arguments, constants, grid, block and memory."""
    source, metadata = compiled.src, compiled.metadata
    if getattr(metadata, "global_scratch_size", 0) or metadata.profile_scratch_size:
        raise RuntimeError(f"{launch.name} needs scratch memory that the header does not allocate")
    names = list(source.signature)
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    promised = {names[path[0]] for path, attributes in source.attrs.items() if attributes}
    arguments = [
        _argument(name, kind, name in promised)
        for name, kind in source.signature.items()
        if kind != "constexpr"
    ]
    scratch = [{"name": name, "type": "pointer", "to": "void", "bytes": 8} for name in SCRATCH]
    return {
        "name": launch.name,
        "file": file,
        "symbol": metadata.name,
        "parameters": names,
        "arguments": [*arguments, *scratch],
        "constants": constants,
        "grid": list(launch.grid),
        "block": [metadata.num_warps * metadata.warp_size, 1, 1],
        "shared": metadata.shared,
    }


def _compile(
    launch: KernelLaunch, operator: Operator, folder: Path, assembly: bool
) -> tuple[dict[str, Any], list[Path]]:
    """Compile one kernel into `folder`; returns its part of the description, and its files."""
    target = aot.TARGETS[operator.target]
    binary, text = ("cubin", "ptx") if target.backend == "cuda" else ("hsaco", "amdgcn")
    compiled = aot.compile_kernel(
        launch.kernel,
        operator.dtype,
        launch.config,
        launch.constants,
        target,
        divisible=operator.divisor == 16,
    )
    if compiled.metadata.shared > target.shared_limit:
        raise ValueError(
            f"{launch.name} needs {compiled.metadata.shared} bytes of shared memory, "
            f"{operator.target} has {target.shared_limit}"
        )
    files = [folder / f"{launch.name}.{binary}"]
    files[0].write_bytes(compiled.asm[binary])
    if assembly:
        files.append(folder / f"{launch.name}.{text}")
        files[1].write_text(compiled.asm[text], encoding="utf-8")
    described = describe(launch, compiled, files[0].name)
    return described | {"config": launch.config._asdict()}, files


def write(operator: Operator, folder: Path, assembly: bool) -> list[Path]:
    """Compile `operator` and write its files, the header and the description last."""
    import triton

    kernels: list[dict[str, Any]] = []
    files: list[Path] = []
    for launch in launches(operator):
        described, written = _compile(launch, operator, folder, assembly)
        kernels.append(described)
        files += written
    description = {
        "schema": SCHEMA,
        "negtome_fast": __version__,
        "triton": triton.__version__,
        "operator": asdict(operator),
        "kind": operator.kind_word,
        "kernels": kernels,
        "sizes": SIZES,
    }
    for name, content in (
        (HEADER, render(operator, description)),
        (DESCRIPTION, json.dumps(description, indent=1) + "\n"),
    ):
        (folder / name).write_text(content, encoding="utf-8")
        files.append(folder / name)
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Run the process; returns the exit code: 0, or 2 after one line on the error."""
    parser = argparse.ArgumentParser(
        prog="negtome_fast.integrations.export.compile", description=__doc__
    )
    parser.add_argument("--assembly", action="store_true")
    options = parser.parse_args(argv)
    try:
        written = [
            [str(path) for path in write(Operator(**fields), Path(folder), options.assembly)]
            for fields, folder in json.load(sys.stdin)
        ]
    except (ValueError, OSError, RuntimeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    print(json.dumps(written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
