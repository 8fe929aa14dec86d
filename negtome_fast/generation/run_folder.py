"""`RunFolder`: the files of a run with their hashes, and the record `run.json` that lists them."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..files import write_atomically
from .settings import RECORD

_PACKAGES = ("negtome-fast", "torch", "triton", "diffusers", "transformers", "numpy", "pillow")


class RunFolder:
    """Folder of one run. Files appear whole or not at all.

    Args:
        path: the folder; `create` makes it.
        overwrite: replace another run there.

    Raises:
        FileExistsError: the folder holds another run, or files that are not of a run.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path = path
        self.files: dict[str, str] = {}
        """Names of the files written, with their SHA-256."""
        self._earlier = _earlier_files(path, overwrite)

    def create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: bytes) -> None:
        write_atomically(self.path / name, content)
        self.files[name] = hashlib.sha256(content).hexdigest()

    def write_record(self, record: dict[str, Any]) -> None:
        """Write `run.json`."""
        text = json.dumps(record, indent=1) + "\n"
        write_atomically(self.path / RECORD, text.encode())

    def remove_earlier(self) -> None:
        """Remove the files of the run that this one replaced."""
        for name in self._earlier - self.files.keys() - {RECORD}:
            (self.path / name).unlink(missing_ok=True)


def new_folder(parent: Path = Path("output")) -> Path:
    """Return the first of `run-001`, `run-002`, ... in `parent` that does not exist."""
    taken = {path.name for path in parent.glob("run-*")} if parent.is_dir() else set()
    number = 1
    while f"run-{number:03}" in taken:
        number += 1
    return parent / f"run-{number:03}"


def _earlier_files(folder: Path, overwrite: bool) -> set[str]:
    """Names of the files of the run that is in the folder."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"`folder` {folder} is a file; give a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return set()
    record = folder / RECORD
    if not record.is_file():
        raise FileExistsError(
            f"`folder` {folder} holds files, but no run; choose another or an empty folder"
        )
    if not overwrite:
        raise FileExistsError(
            f"`folder` {folder} holds another run; choose another folder, or use `overwrite`"
        )
    try:
        files = json.loads(record.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return set()
    return {name for name in files if Path(name).name == name}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide how an image looks."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    from .. import __version__

    return {**found, "negtome-fast": __version__, "torch": torch.__version__}


def plain_value(value: Any) -> Any:
    """Return the value if JSON can hold it, else its text."""
    return (
        value if isinstance(value, (str, int, float, bool, type(None), list, dict)) else str(value)
    )
