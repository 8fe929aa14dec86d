"""Arrays in files named by a hash of everything that decides them, so that a killed run resumes.

A file that is damaged, or holds other arrays than its name promises, is named and made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files import check_writable, write_atomically

Arrays = dict[str, np.ndarray]

STORE = Path("output/eval")
"""The default folder."""


def digest(value: Any) -> str:
    """Return a short hash of plain values; the order of dictionary keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(path: Path, rows: Mapping[str, int | None] | None = None) -> Arrays:
    """Return all arrays of a file.

    Args:
        path: the file.
        rows: names of the arrays that it must have, with their lengths; None allows any length.

    Raises:
        ValueError: the file is damaged, or has other arrays; names the file.
        OSError: the file cannot be read.
    """
    try:
        stored = np.load(path)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("it is no archive of arrays")
        with stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged: {reason}") from error
    for name, length in (rows or {}).items():
        if name not in arrays:
            raise ValueError(f"{path} has no {name!r}, but {', '.join(arrays) or 'nothing'}")
        found = arrays[name]
        if length is not None and (found.ndim == 0 or len(found) != length):
            raise ValueError(f"{path} has {name!r} of shape {found.shape}, not {length} rows")
    return arrays


def save(path: Path, arrays: Mapping[str, Any], identity: Mapping[str, Any] | None = None) -> None:
    """Write the file atomically, and `identity` beside it as `condition.json` for human readers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if identity is not None:
        save_text(path.parent / "condition.json", json.dumps(identity, indent=1) + "\n")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    _write(path, buffer.getvalue())


def fetch(
    path: Path | None,
    make: Callable[[], Arrays],
    identity: Mapping[str, Any] | None = None,
    rows: Mapping[str, int | None] | None = None,
) -> Arrays:
    """Return the arrays of `path`, or make and save them; without a path nothing is saved.

    A file that `load` refuses is named in a `UserWarning`, made again and replaced.
    """
    if path is not None and path.is_file():
        try:
            return load(path, rows)
        except ValueError as error:
            warnings.warn(f"{error}; it is made again", stacklevel=2)
    arrays = make()
    if path is not None:
        save(path, arrays, identity)
    return arrays


def save_png(path: Path, picture: Any, **options: Any) -> None:
    """Write a figure of matplotlib or an image of Pillow atomically as PNG."""
    buffer = io.BytesIO()
    write = picture.savefig if hasattr(picture, "savefig") else picture.save
    write(buffer, format="png", **options)
    _write(path, buffer.getvalue())


def save_text(path: Path, text: str) -> None:
    """Write a text atomically."""
    _write(path, text.encode())


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # of a full disk


def check_file(field: str, path: Path) -> None:
    """Check that a file can be written, and leave nothing; raises as `check_writable`."""
    if path.is_dir():
        raise IsADirectoryError(f"`{field}` {path} is a folder; give a file")
    check_writable(field, path.parent)
