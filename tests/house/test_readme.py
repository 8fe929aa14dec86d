"""The README says what the repository holds: its tables, commands and links."""

from __future__ import annotations

import re
from pathlib import Path

from negtome_fast.cli import build_parser

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


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
