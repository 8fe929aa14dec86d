"""Files that are replaced in one step: a run that is killed leaves the last complete one."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file in one step: it is complete or as it was before, whatever happens meanwhile.

    Several processes may write the same file, since each writes to a partial file of its own first.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
