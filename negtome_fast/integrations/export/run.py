"""Compile operators into folders, in a process of their own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ...files import check_writable, partial_of, remove_abandoned
from ...kernels import aot
from .operator import Operator

DESCRIPTION = "negtome.json"


def export(operator: Operator, folder: Path | str, assembly: bool = False) -> list[Path]:
    """Compile `operator` into `folder`, which is created if missing.

    Args:
        operator: the operator and its target.
        folder: for the kernels, the header and the description, which appear when all are
            complete. Files of other names that are in it stay.
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
    folders = [folder.resolve() for _, folder in operators]
    partial = [_partial(folder) for folder in folders]
    # A new process, because kernels that were imported under TRITON_INTERPRET cannot be compiled.
    given = [[asdict(one), str(p)] for (one, _), p in zip(operators, partial, strict=True)]
    options = ["--assembly"] if assembly else []
    try:
        for made in partial:
            made.mkdir()
        printed = aot.run_compiling(f"{__package__}.compile", options, json.dumps(given))
        written = [[Path(path).name for path in paths] for paths in json.loads(printed)]
        return [_moved(*one) for one in zip(partial, folders, written, strict=True)]
    finally:
        for made in partial:
            shutil.rmtree(made, ignore_errors=True)


def _partial(folder: Path) -> Path:
    """Return where the files for `folder` are written first, on the same file system."""
    check_writable("folder", folder)
    place = folder if folder.is_dir() else folder.parent
    place.mkdir(parents=True, exist_ok=True)
    remove_abandoned(place, folder.name)
    return partial_of(place / folder.name)


def _moved(partial: Path, folder: Path, names: Sequence[str]) -> list[Path]:
    """Move complete files into place, the description last; returns their paths.

    An earlier description goes first, so that it never describes the kernels of another export.
    """
    if not folder.exists():
        partial.rename(folder)
    else:
        (folder / DESCRIPTION).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: name == DESCRIPTION):
            os.replace(partial / name, folder / name)
    return [folder / name for name in names]
