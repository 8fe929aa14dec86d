"""docs/applications.md: its commands are those that made its pictures, and they can be run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from docs import make_pictures
from docs.render.pages import render
from negtome_fast.cli import build_parser
from negtome_fast.generation import APPLICATIONS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "applications.md").read_text(encoding="utf-8")


def test_page_shows_the_commands_and_pictures_of_the_script(tmp_path: Path) -> None:
    record = json.loads(make_pictures.RECORD.read_text(encoding="utf-8"))
    assert set(make_pictures.EXAMPLES) == set(APPLICATIONS) == set(record)
    for name, example in make_pictures.EXAMPLES.items():
        assert record[name]["commands"] == make_pictures.commands(name)
        assert record[name]["measure"] == example.says
        assert (make_pictures.PICTURES / f"{name}.png").is_file()
    page = "docs/applications.md"
    assert render(page, PAGE) == PAGE
    record["style"]["commands"][-1] += " -n 9"
    (tmp_path / "pictures.json").write_text(json.dumps(record))
    assert render(page, PAGE, tmp_path) != PAGE


def test_commands_of_the_page_are_understood() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == len(APPLICATIONS)
    for line in filter(None, "\n".join(blocks).replace("\\\n", " ").splitlines()):
        program, *arguments = shlex.split(line)
        assert program == "negtome-fast"
        build_parser().parse_args(arguments)


def test_links_and_code_of_the_page() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert target.startswith("http") or (DOCS / target).exists(), target
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        compile(block, "applications.md", "exec")
