"""Compile operators into folders, in a process of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ...kernels import aot
from .operator import Operator


def export(operator: Operator, folder: Path | str, assembly: bool = False) -> list[Path]:
    """Compile `operator` into `folder` (made if missing); the files that were written.

    assembly: also write the PTX or the AMD assembly of every kernel, as text.

    Raises ValueError where the target's shared memory does not suffice, RuntimeError without Triton
    or where the compiler fails, OSError where the folder cannot be written.
    """
    return export_all([(operator, Path(folder))], assembly)[0]


def export_all(
    operators: Sequence[tuple[Operator, Path]], assembly: bool = False
) -> list[list[Path]]:
    """`export` for several operators, each with its folder, in one process."""
    for _, folder in operators:
        folder.mkdir(parents=True, exist_ok=True)
    # In a process of its own: kernels that were imported under TRITON_INTERPRET cannot be compiled.
    given = [[asdict(operator), str(folder.resolve())] for operator, folder in operators]
    options = ["--assembly"] if assembly else []
    printed = aot.run_compiling(f"{__package__}.compile", options, json.dumps(given))
    return [[Path(path) for path in paths] for paths in json.loads(printed)]
