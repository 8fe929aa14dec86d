"""Files that are replaced at once: a run that is killed leaves the last whole one."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """The file is whole or as it was before, whatever happens meanwhile.

    Several processes may write the same file: each has a partial one of its own.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
