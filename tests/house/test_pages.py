"""All pages of the repository: their code can be run, their links lead somewhere, and the site has
every page of docs/."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import negtome_fast
from negtome_fast.cli import build_parser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")))
}
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
MODULES = r"python3? -m ((?:bench|negtome_fast|docs)(?:\.\w+)*)"


def blocks(page: str, language: str) -> list[str]:
    return [one["code"] for one in BLOCK.finditer(PAGES[page]) if one["language"] == language]


def commands(page: str) -> Iterator[list[str]]:
    """Words of the lines in the page's shell blocks, without comments."""
    for code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


pages = pytest.mark.parametrize("page", PAGES)


@pages
def test_python_blocks_parse(page: str) -> None:
    for code in blocks(page, "python"):
        compile(code, page, "exec")


@pages
def test_shell_blocks_are_understood_by_the_command_line(page: str) -> None:
    for program, *arguments in commands(page):
        if program != "negtome-fast":
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                build_parser().parse_args(arguments)
        except SystemExit as stopped:
            assert stopped.code == 0, arguments  # 0: --help


@pages
def test_programs_modules_and_targets_exist(page: str) -> None:
    text = PAGES[page]
    help_text = build_parser().format_help()
    for command in set(re.findall(r"`negtome-fast ([a-z]+)", text)):
        assert re.search(rf"^ +{command}\b", help_text, re.MULTILINE), command
    for module in set(re.findall(MODULES, text)):
        assert importlib.util.find_spec(module) is not None, module
    named = set(re.findall(r"`make ([a-z-]+)", text))
    for program, *arguments in commands(page):
        if program == "make":
            named.add(arguments[0])
        if program == "python" and arguments[0] != "-m":
            assert (ROOT / arguments[0]).is_file(), arguments[0]
    for target in named:
        assert re.search(rf"^[\w -]*\b{target}\b[\w -]*:", MAKEFILE, re.MULTILINE), target


def anchors(path: Path) -> set[str]:
    """Anchors of the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}


@pages
def test_links_lead_somewhere(page: str) -> None:
    here = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", PAGES[page])):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = here.parent / target if target else here
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def entries(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, list | dict):
        for one in nav.values() if isinstance(nav, dict) else nav:
            yield from entries(one)


def test_the_site_has_every_page() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    linked = list(entries(site["nav"]))
    assert len(linked) == len(set(linked))
    made = {"contributing.md", "changelog.md"}  # by docs/site_links.py, from files of the root
    assert set(linked) - made == {name[5:] for name in PAGES if name.startswith("docs/")}
    assert made <= set(linked)


def test_the_api_reference_has_every_public_name() -> None:
    reference = "".join(text for name, text in PAGES.items() if name.startswith("docs/reference/"))
    described = re.findall(r"^::: negtome_fast\.(?:\w+\.)*(\w+)$", reference, re.MULTILINE)
    assert set(negtome_fast.__all__) <= set(described)


def test_files_that_contributing_names_exist() -> None:
    folders = r"`((?:kernels|negtome_fast|bench|docs|tests)/[\w./-]*)`"
    named = re.findall(folders, PAGES["CONTRIBUTING.md"])
    assert len(named) > 20
    for path in set(named) - {"kernels/tuned/ARCH.json"}:
        assert (ROOT / path).exists(), path
