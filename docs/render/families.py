"""The table of the denoisers that the package knows, from its layouts and the tests' families."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from bench._path import ROOT

from . import markers


def image_place(layout: Any) -> str:
    """Place of the image tokens in an attention output that is one tensor."""
    if layout.grid_modules:
        return "all, a grid for each resolution"
    if layout.joint is None:
        return "after each caption" if layout.captions else "all"
    return "after the text" if layout.joint == "text_first" else "before the text"


def tested_as(tests: Sequence[Any]) -> str:
    """Say what tests run of one class: whole pipelines, the denoiser alone, or both, with notes."""
    kinds = {
        kind: ", ".join(dict.fromkeys(test.note for test in tests if test.whole is whole))
        for kind, whole in (("whole pipeline", True), ("denoiser alone", False))
        if any(test.whole is whole for test in tests)
    }
    if len(kinds) == 1:
        return next(iter(kinds))
    named = (f"{kind} ({names})" if names else kind for kind, names in kinds.items())
    return "; ".join(named) or "not run"


def table() -> str:
    """The known classes of denoisers, one per row, in the order of the code."""
    from negtome_fast.pipelines import known_layouts

    sys.path.insert(0, str(ROOT / "tests"))
    try:
        tests = list(importlib.import_module("helpers.families").FAMILIES.values())
    finally:
        sys.path.remove(str(ROOT / "tests"))
    rows = [
        [
            layout.family,
            f"`{name}`",
            image_place(layout),
            "one batch" if layout.guidance == "concatenated" else "one call each",
            tested_as([test for test in tests if test.model == name]),
        ]
        for name, layout in known_layouts().items()
    ]
    header = (
        "family",
        "denoiser",
        "image tokens in the attention output",
        "guidance halves",
        "tested as",
    )
    return markers.table(header, rows)
