"""The generated parts of a page, each between `<!-- begin: NAME -->` and `<!-- end: NAME -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

PART = re.compile(r"<!-- begin: (?P<name>[\w-]+) -->\n.*?<!-- end: (?P=name) -->", re.DOTALL)
NOT_MEASURED = "not measured"


def names(text: str) -> list[str]:
    """Names of the parts of a page, in order."""
    return [part["name"] for part in PART.finditer(text)]


def fill(text: str, body: Callable[[str], str]) -> str:
    """`text` with `body(name)` as the content of each part."""

    def filled(part: re.Match[str]) -> str:
        name = part["name"]
        return f"<!-- begin: {name} -->\n{body(name)}\n<!-- end: {name} -->"

    return PART.sub(filled, text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
