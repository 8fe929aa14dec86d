"""The site of docs/: links to files outside docs/, and docstrings with two names in one entry."""

from __future__ import annotations

import pytest

pytest.importorskip("mkdocs", reason='the extra "docs" is not installed')
pytest.importorskip("griffe", reason='the extra "docs" is not installed')

from docs.site_docstrings import split_entries
from docs.site_links import content_of, rewritten, site_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("docs/reference/operator.md", "reference/operator.md"),
        ("README.md", "index.md"),
        ("CONTRIBUTING.md", "contributing.md"),
        ("bench/results/demo.png", "repository/bench/results/demo.png"),
        ("bench/NOTES.md", "repository/bench/NOTES.md"),
        ("examples/data_parallel.py", "repository/examples/data_parallel.py.md"),
        ("bench/results/eval", "repository/bench/results/eval/index.md"),
    ],
)
def test_files_of_the_repository_have_a_place_in_the_site(path: str, expected: str) -> None:
    assert site_path(path) == expected


def test_links_are_relative_to_the_page_that_has_them() -> None:
    page = (
        "[a](../operator.md#backends) ![b](../../bench/results/demo.png) [c](https://x.example)\n"
        "```python\nx = [d](../operator.md)\n```\n[e](../../README.md) [f](missing.md)"
    )
    assert rewritten(page, "docs/reference/operator.md") == (
        "[a](../operator.md#backends) ![b](../repository/bench/results/demo.png) "
        "[c](https://x.example)\n"
        "```python\nx = [d](../operator.md)\n```\n[e](../index.md) [f](missing.md)"
    )
    assert rewritten("[a](docs/install.md)", "CONTRIBUTING.md") == "[a](install.md)"
    assert rewritten("[a](../docs/install.md)", "bench/NOTES.md") == "[a](../../install.md)"


def test_sources_are_shown_as_they_are() -> None:
    shown = content_of("docs/site_links.py")
    assert "`````python\n" in shown and "def site_path(path: str) -> str:" in shown


def test_an_entry_for_two_names_becomes_two() -> None:
    docstring = (
        "Summary, of: this.\n\n"
        "Args:\n"
        "    step, num_steps: index and\n"
        "        number.\n"
        "    other: what a, b: is not.\n"
    )
    assert split_entries(docstring) == (
        "Summary, of: this.\n\n"
        "Args:\n"
        "    step: index and\n"
        "        number.\n"
        "    num_steps: index and\n"
        "        number.\n"
        "    other: what a, b: is not.\n"
    )
