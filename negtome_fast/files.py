"""Files that are replaced in one step: a run that is killed leaves the last complete one."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from pathlib import Path

_MACHINE = re.sub(r"\W", "_", platform.node()) or "_"
_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?:(?P<machine>\w+)@)?(?P<process>\d+)\.partial", re.DOTALL)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file in one step: it is complete or as it was before, whatever happens meanwhile.

    Several processes may write the same file, since each writes to a partial file of its own first.
    """
    partial = partial_of(path)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Return the place beside `path` where this process writes it until it is complete."""
    return path.with_name(f".{path.name}.{_MACHINE}@{os.getpid()}.partial")


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove the partial files and folders that processes left which were killed.

    Args:
        folder: where to look; need not exist.
        name: only those of a file of this name; None: all.
    """
    if not folder.is_dir():
        return
    for path in folder.glob(".*.partial"):
        found = _PARTIAL.fullmatch(path.name)
        if found is None or name not in (None, found["name"]):
            continue
        if found["machine"] not in (None, _MACHINE) or _runs(int(found["process"])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_writable(field: str, folder: Path) -> None:
    """Check that a folder can be made and written to, before the work whose result it gets.

    Raises:
        OSError: names the field and the folder.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(
            f"`{field}` {folder} cannot be made: {existing} is a file; give a folder"
        )
    try:  # permissions do not tell what root may do, nor a file system that is read-only
        with tempfile.TemporaryDirectory(prefix=".negtome-fast-", dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OSError(f"`{field}` {folder} cannot be written to: {reason}") from error


def is_partial(path: Path) -> bool:
    """Return True for a file or folder that is being written, or was until a process was killed."""
    return _PARTIAL.fullmatch(path.name) is not None


def _runs(process: int) -> bool:
    """Return True if a process of this machine has this number, or if that cannot be told."""
    if os.name != "posix":
        return True  # a signal 0 ends the process elsewhere
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
