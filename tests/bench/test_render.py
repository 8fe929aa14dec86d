"""The pages show the results: every generated part is up to date, and comes from its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench._path import ROOT
from bench.results import FOLDER
from docs.render.__main__ import main
from docs.render.pages import PAGES, Part, render

OF_STUDIES = {"docs/beyond.md", "docs/evaluation.md", "docs/nudging.md"}
"""Pages with tables of the studies, which import diffusers and more."""


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_the_results(page: str) -> None:
    if page in OF_STUDIES:
        pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
    assert main(["--check", page]) == 0


def part_of(file: str, name: str) -> tuple[str, Part]:
    """The page and the part of this name that is made from a file."""
    return next(
        (page, parts[name])
        for page, parts in PAGES.items()
        if name in parts and file in parts[name].files
    )


def test_a_missing_result_reads_not_measured(tmp_path: Path) -> None:
    page, _ = part_of("gpu.json", "gpu")
    shown = render(page, "<!-- begin: gpu -->\n| old |\n<!-- end: gpu -->", tmp_path)
    assert "not measured" in shown and "old" not in shown


@pytest.mark.parametrize("page", PAGES)
def test_an_unknown_part_is_refused(page: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="marks 'speed'; its parts are"):
        render(page, "<!-- begin: speed -->\n<!-- end: speed -->", tmp_path)


def test_figures_come_from_the_file(tmp_path: Path) -> None:
    record = json.loads((FOLDER / "demo.json").read_text(encoding="utf-8"))
    record["results"][0]["guided"]["cosine"] = 0.1234
    (tmp_path / "demo.json").write_text(json.dumps(record))
    _, part = part_of("demo.json", "demo")
    assert "0.123" in part.render(tmp_path)


def test_a_stale_page_is_named_and_written_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = "docs/measures.md"
    text = (ROOT / page).read_text(encoding="utf-8")
    stale = tmp_path / page
    stale.parent.mkdir()
    stale.write_text(text.replace("| 2 | 64 |", "| 3 | 64 |"), encoding="utf-8")
    assert main(["--check", page], tmp_path) == 1
    assert page in capsys.readouterr().err
    assert main([page], tmp_path) == 0
    assert stale.read_text(encoding="utf-8") == text


def test_a_part_without_a_marker_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "measures.md").write_text("nothing")
    with pytest.raises(ValueError, match=r"docs/measures\.md has no marker for coverage"):
        main(["--check", "docs/measures.md"], tmp_path)


def test_an_unknown_page_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["docs/nowhere.md"])
    assert "no page docs/nowhere.md" in capsys.readouterr().err
