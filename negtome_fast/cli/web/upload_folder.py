"""`UploadFolder`: the private folder of the page's files, with a quota."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "GRADIO_TEMP_DIR"
"""Environment variable in which gradio looks for its folder."""

MOST_FILES = 64
MOST_UPLOADED = 128 * 2**20
"""Quota of the uploads of all pages; the oldest go first."""
MOST_STORED = 2**30
"""Quota in bytes of the whole folder, which also holds the images that were drawn."""


class UploadFolder:
    """A new folder for uploads and drawn images, which only this user can read.

    It lies inside gradio's own folder, which gradio checks names of files against.
    """

    def __init__(self) -> None:
        parent = Path(os.environ.get(VARIABLE) or Path(tempfile.gettempdir()) / "gradio")
        parent.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix="negtome-fast-", dir=parent)).resolve()
        self._uploads: dict[Path, str] = {}  # the client of each, oldest first

    @contextmanager
    def for_gradio(self) -> Iterator[None]:
        """Context in which gradio's components and applications take this folder as theirs."""
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = str(self.path)
        try:
            yield
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before

    def keep(self, client: str, paths: Sequence[str]) -> None:
        """Note files that a client uploaded, and remove the oldest ones beyond the quota."""
        for text in paths:
            path = Path(text).resolve()
            if path.is_relative_to(self.path):
                self._uploads.pop(path, None)
                self._uploads[path] = client
        while len(self._uploads) > MOST_FILES or self._size(self._uploads) > MOST_UPLOADED:
            self._remove(next(iter(self._uploads)))
        self.trim()

    def forget(self, client: str) -> None:
        """Remove the uploads of a client."""
        for path in [path for path, owner in self._uploads.items() if owner == client]:
            self._remove(path)

    def trim(self) -> None:
        """Remove the oldest files of the whole folder beyond its quota."""
        files = sorted((p for p in self.path.rglob("*") if p.is_file()), key=_changed)
        total = self._size(files)
        for path in files:
            if total <= MOST_STORED:
                break
            total -= self._size([path])
            self._remove(path)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _remove(self, path: Path) -> None:
        self._uploads.pop(path, None)
        path.unlink(missing_ok=True)

    @staticmethod
    def _size(paths: Sequence[Path] | dict[Path, str]) -> int:
        return sum(path.stat().st_size for path in paths if path.is_file())


def _changed(path: Path) -> float:
    try:
        return path.stat().st_ctime
    except FileNotFoundError:
        return 0.0
