"""docs/applications.md: its commands are those that made its pictures, and they can be run."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from negtome_fast.cli import build_parser
from negtome_fast.generation import APPLICATIONS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "applications.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_pictures", DOCS / "make_pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["make_pictures"] = module
    spec.loader.exec_module(module)
    return module


def test_page_shows_the_commands_and_pictures_of_the_script(
    pictures: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert pictures.main(["--check"]) == 0
    assert set(pictures.EXAMPLES) == set(APPLICATIONS)
    other = tmp_path / "applications.md"
    other.write_text(PAGE.replace("--preset style --prompt", "--preset style -n 9 --prompt"))
    monkeypatch.setattr(pictures, "PAGE", other)
    assert pictures.main(["--check"]) == 1


def test_commands_of_the_page_are_understood(pictures: ModuleType) -> None:
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
