"""`RunFolder`: the files of a run with their hashes, and the record `run.json` that lists them."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..files import check_writable, is_partial, remove_abandoned, write_atomically
from .settings import RECORD

_PACKAGES = ("negtome-fast", "torch", "triton", "diffusers", "transformers", "numpy", "pillow")


class RunFolder:
    """Folder of one run. Files appear whole or not at all, and the record before all others.

    Args:
        path: the folder; `recording` makes it.
        overwrite: replace another run there.

    Raises:
        FileExistsError: the folder holds another run, or files that are not of a run.
        OSError: it cannot be made or written to.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path = path
        self.files: dict[str, str] = {}
        """Names of the files written, with their SHA-256."""
        self.record: dict[str, Any] = {}
        """The contents of `run.json`; `save_record` writes them."""
        self._earlier = _earlier_files(path, overwrite)
        self._replaced: dict[str, bytes] = {}
        self._new = not path.is_dir()
        check_writable("folder", path)

    @contextmanager
    def recording(self, record: dict[str, Any]) -> Iterator[None]:
        """Write the record before the run, at its end, and after an error or an interrupt.

        The files of the run that this one replaces are removed at the end. If a run fails before
        anything is finished, the folder is as it was.

        Raises:
            FileExistsError: another run has taken the folder meanwhile.
        """
        self.record = {"format": 1, "status": "running", **record}
        self._claim()
        try:
            with warnings.catch_warnings():
                self.record["warnings"] = _kept_warnings()
                self.save_record()
                yield
                self.record["status"] = "complete"
                self.save_record()
        except BaseException as error:
            failed = isinstance(error, Exception)
            self.record["status"] = "failed" if failed else "interrupted"
            with suppress(OSError):  # a full disk: the last record stays
                self.save_record()
            if failed:
                self._undo_if_fruitless()
            raise
        for name in self._earlier - self.files.keys() - {RECORD}:
            (self.path / name).unlink(missing_ok=True)

    def _claim(self) -> None:
        """Make the folder, and the record, which no other run may have made meanwhile."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.path)
        if self._earlier:
            files = [name for name in self._earlier if not _MADE.fullmatch(name)]
            self._replaced = {name: (self.path / name).read_bytes() for name in files}
            return
        try:
            (self.path / RECORD).open("x").close()
        except FileExistsError:
            raise FileExistsError(
                f"`folder` {self.path} was taken by another run meanwhile; choose another folder"
            ) from None

    def write(self, name: str, content: bytes) -> None:
        write_atomically(self.path / name, content)
        self.files[name] = hashlib.sha256(content).hexdigest()

    def save_record(self) -> None:
        """Write `run.json`, with the files so far."""
        self.record["files"] = self.files
        text = json.dumps(self.record, indent=1) + "\n"
        write_atomically(self.path / RECORD, text.encode())

    def _undo_if_fruitless(self) -> None:
        """Undo what a failed run wrote that finished no image, and remove the folder if it is new.

        An earlier run in the folder gets its record and the copies of its references back.
        """
        if any(_MADE.fullmatch(name) for name in self.files):
            return
        for name in {*self.files, RECORD} - self._replaced.keys():
            (self.path / name).unlink(missing_ok=True)
        for name, content in self._replaced.items():
            write_atomically(self.path / name, content)
        if self._new:
            with suppress(OSError):  # it holds somebody else's files
                self.path.rmdir()


def _kept_warnings() -> list[str]:
    """Return a list that gets the text of every `UserWarning`, which is shown as before."""
    real, seen = warnings.showwarning, list[str]()

    def show(message: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(message, UserWarning) and str(message) not in seen:
            seen.append(str(message))
        real(message, *args, **kwargs)

    warnings.showwarning = show
    return seen


@contextmanager
def numbered_folder(chosen: Path | None, parent: Path = Path("output")) -> Iterator[Path]:
    """Yield the chosen folder, or a new one of `parent`, which is removed if it stays empty."""
    if chosen is not None:
        yield chosen
        return
    made = [parent] if not parent.exists() else []
    folder = new_folder(parent)
    try:
        yield folder
    finally:
        with suppress(OSError):  # not empty
            for empty in (folder, *made):
                empty.rmdir()


def new_folder(parent: Path = Path("output")) -> Path:
    """Make and return the first of `run-001`, `run-002`, ... in `parent` that does not exist.

    Runs that start together get a folder each.
    """
    number = 1
    while True:
        folder = parent / f"run-{number:03}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError:
            if not parent.is_dir():
                raise
            number += 1
        except FileNotFoundError:
            continue  # another run removed the empty parent between the two lines


_MADE = re.compile(r"(guided|plain|before|after)-\d+-\d{3,}(\.flagged)?\.(png|mp4|gif)")
"""Names of finished images and videos."""

_COPIED = re.compile(r"(reference|mask)-\d+(\.[^.]*)?|sheet\.png")
"""Names of the other files that a run writes."""


def _earlier_files(folder: Path, overwrite: bool) -> set[str]:
    """Names of the files of the run that is in the folder; empty if there is none.

    They are known by their names, since a killed run has files that its record does not list yet.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"`folder` {folder} is a file; give a folder")
    found = [p for p in folder.iterdir() if not is_partial(p)] if folder.is_dir() else []
    if not found:
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
    names = {path.name for path in found}
    return {RECORD} | {n for n in names if _MADE.fullmatch(n) or _COPIED.fullmatch(n)}


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
