"""Tables of README.md and docs/ that are made from results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import readme
from bench.readme_rows import FILES


def test_tables_are_those_of_the_results() -> None:
    assert readme.main(["--check"]) == 0


def test_missing_result_reads_not_measured(tmp_path: Path) -> None:
    marked = "<!-- begin: gpu -->\n| old |\n<!-- end: gpu -->"
    assert "not measured" in readme.render(marked, tmp_path)
    assert "old" not in readme.render(marked, tmp_path)


def test_unknown_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'speed'; known"):
        readme.render("<!-- begin: speed -->\n<!-- end: speed -->", tmp_path)


def test_figures_come_from_the_file(tmp_path: Path) -> None:
    record = json.loads((readme.RESULTS / "demo.json").read_text(encoding="utf-8"))
    record["results"][0]["guided"]["cosine"] = 0.1234
    (tmp_path / "demo.json").write_text(json.dumps(record))
    marked = "<!-- begin: demo -->\n<!-- end: demo -->"
    assert "0.123" in readme.render(marked, tmp_path)


def test_the_three_rows_come_from_the_files(tmp_path: Path) -> None:
    marked = "<!-- begin: results -->\n<!-- end: results -->"
    assert "not measured" in readme.render(marked, tmp_path)
    (tmp_path / "eval").mkdir()
    for file in FILES:
        record = json.loads((readme.RESULTS / file).read_text(encoding="utf-8"))
        for one in record.get("frontiers", ()):
            one["ratio"] = [7.0, 6.0, 8.0]
        (tmp_path / file).write_text(json.dumps(record))
    rows = readme.render(marked, tmp_path)
    assert "7.00 times [6.00, 8.00]" in rows
    assert rows.count("\n| ") == 5 and "not measured" not in rows
