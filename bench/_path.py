"""Makes `negtome_fast.kernels` importable from a checkout that is not installed.

`kernels/` lies beside `negtome_fast/`, and an installation maps it into the package. Without one, a
finder at the end of `sys.meta_path` does the same. Importing this module is enough; pytest does it
with `-p bench._path`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "negtome_fast.kernels"


class _KernelsFinder(importlib.abc.MetaPathFinder):
    """Finds the package `negtome_fast.kernels` in `ROOT / "kernels"`."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != PACKAGE:
            return None
        folder = ROOT / "kernels"
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if not any(isinstance(finder, _KernelsFinder) for finder in sys.meta_path):
    sys.meta_path.append(_KernelsFinder())
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
