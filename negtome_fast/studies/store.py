"""Arrays in files named by a hash of everything that decides them, so that a killed run resumes."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically

Arrays = dict[str, np.ndarray]

STORE = Path("output/eval")
"""The default folder."""


def digest(value: Any) -> str:
    """Return a short hash of plain values; the order of dictionary keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(path: Path) -> Arrays:
    """Return all arrays of a file."""
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def save(path: Path, arrays: Mapping[str, Any], identity: Mapping[str, Any] | None = None) -> None:
    """Write the file atomically, and `identity` beside it as `condition.json` for human readers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if identity is not None:
        text = json.dumps(identity, indent=1) + "\n"
        write_atomically(path.parent / "condition.json", text.encode())
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def fetch(
    path: Path | None,
    make: Callable[[], Arrays],
    identity: Mapping[str, Any] | None = None,
) -> Arrays:
    """Return the arrays of `path`, or make and save them; without a path nothing is saved."""
    if path is not None and path.is_file():
        return load(path)
    arrays = make()
    if path is not None:
        save(path, arrays, identity)
    return arrays
