"""Pages of which parts are written from result files.

Such a part stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
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


def update(
    module: str,
    purpose: str | None,
    page: Path,
    render: Callable[[str], str],
    argv: Sequence[str] | None = None,
    before: Callable[[str], object] = lambda text: None,
) -> int:
    """The command `python -m MODULE [--check]`, which renders a page anew.

    Args:
        module: name of the command.
        purpose: its help.
        page: the file.
        render: what the page is to be, of what it is.
        argv: arguments; default: those of the program.
        before: is called with the page before it is written; not with --check.

    Returns:
        The exit code: 1 where --check finds that the page is not what `render` makes of it.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=purpose)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    text = page.read_text(encoding="utf-8")
    rendered = render(text)
    if options.check:
        if rendered != text:
            print(f"{page.name} is not up to date: run python -m {module}", file=sys.stderr)
        return int(rendered != text)
    before(text)
    page.write_text(rendered, encoding="utf-8")
    return 0
