"""An extension of griffe: `a, b: text` in a docstring's section becomes one entry for each name."""

from __future__ import annotations

import re
from typing import Any

import griffe

PAIRED = re.compile(
    r"^(?P<indent> {4,})(?P<names>\w+(?:, \w+)+):(?P<text>.*(?:\n(?P=indent) +\S.*)*)$",
    re.MULTILINE,
)


def split_entries(text: str) -> str:
    """The docstring with an entry of its own for each name; they share the description."""
    return PAIRED.sub(
        lambda found: "\n".join(
            f"{found['indent']}{name}:{found['text']}" for name in found["names"].split(", ")
        ),
        text,
    )


class SplitEntries(griffe.Extension):
    """Applies `split_entries` to every docstring."""

    def on_instance(self, *, obj: griffe.Object, **arguments: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = split_entries(obj.docstring.value)
