"""The three rows of results in README.md are made from the result files."""

from __future__ import annotations

import json
from pathlib import Path

from bench.results import FOLDER
from docs.render.pages import render
from docs.render.readme import FILES

MARKED = "<!-- begin: results -->\n<!-- end: results -->"


def test_the_three_rows_come_from_the_files(tmp_path: Path) -> None:
    assert "not measured" in render("README.md", MARKED, tmp_path)
    (tmp_path / "eval").mkdir()
    for file in FILES:
        record = json.loads((FOLDER / file).read_text(encoding="utf-8"))
        for one in record.get("frontiers", ()):
            one["ratio"] = [7.0, 6.0, 8.0]
        (tmp_path / file).write_text(json.dumps(record))
    rows = render("README.md", MARKED, tmp_path)
    assert "7.00 times [6.00, 8.00]" in rows
    assert rows.count("\n| ") == 5 and "not measured" not in rows
