"""Compile operators into folders, in a process of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ...kernels import aot
from .operator import Operator


def export(operator: Operator, folder: Path | str, assembly: bool = False) -> list[Path]:
    """Compile `operator` into `folder`, which is created if missing.

    Args:
        operator: the operator and its target.
        folder: for the kernels, the header and the description.
        assembly: also write the PTX or the AMD assembly of every kernel, as text.

    Returns:
        The files that were written.

    Raises:
        RuntimeError: Triton is not installed, the compiler failed, or a kernel needs more shared
            memory than the target has.
        OSError: the folder cannot be written to.
    """
    return export_all([(operator, Path(folder))], assembly)[0]


def export_all(
    operators: Sequence[tuple[Operator, Path]], assembly: bool = False
) -> list[list[Path]]:
    """Export several operators, each into its folder, in one process. Raises as `export`."""
    for _, folder in operators:
        folder.mkdir(parents=True, exist_ok=True)
    # A new process, because kernels that were imported under TRITON_INTERPRET cannot be compiled.
    given = [[asdict(operator), str(folder.resolve())] for operator, folder in operators]
    options = ["--assembly"] if assembly else []
    printed = aot.run_compiling(f"{__package__}.compile", options, json.dumps(given))
    return [[Path(path) for path in paths] for paths in json.loads(printed)]
