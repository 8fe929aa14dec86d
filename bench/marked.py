"""Pages of which parts are written from result files.

Such a part stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PART = re.compile(r"<!-- begin: (?P<name>[\w-]+) -->\n.*?<!-- end: (?P=name) -->", re.DOTALL)
NOTHING = "not measured"

Tables = Mapping[str, tuple[str, Callable[[dict[str, Any]], str]]]
"""Name of a part -> the result file, and what makes its text of the file's content."""


def fill(text: str, body: Callable[[str], str]) -> str:
    """`text` with what `body` says for the name of each part."""

    def filled(found: re.Match[str]) -> str:
        name = found["name"]
        return f"<!-- begin: {name} -->\n{body(name)}\n<!-- end: {name} -->"

    return PART.sub(filled, text)


def body_of(name: str, tables: Tables, results: Path) -> str:
    """The text of one part from the files in `results`; "not measured" where its file is missing.

    Raises:
        ValueError: no such part.
    """
    if name not in tables:
        raise ValueError(f"a page marks the table {name!r}; known: {', '.join(tables)}")
    file, table = tables[name]
    path = results / file
    return table(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else NOTHING
