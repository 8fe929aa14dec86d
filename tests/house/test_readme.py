"""The README says what the repository holds: its tables, commands and links."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import readme
from negtome_fast.cli import build_parser

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("demo", "test", "lint", "bench"):
        assert f"make {command}" in TEXT
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)


def test_commands_of_the_readme_exist() -> None:
    help_text = build_parser().format_help()
    for command in set(re.findall(r"negtome-fast ([a-z]+)", TEXT)):
        assert command in help_text


def test_python_examples_parse() -> None:
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        compile(block, "README.md", "exec")
