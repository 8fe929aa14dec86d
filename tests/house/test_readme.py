"""README.md: its length and order, its example, and the tables that are made from results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import negtome_fast as nf
from bench import readme

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def prose(text: str) -> list[str]:
    """Words of a page outside code blocks, rows of tables and comments; a link's target is part
    of its last word."""
    for left_out in (r"^```.*?^```", r"^\|.*?$", r"<!--.*?-->"):
        text = re.sub(left_out, "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\S*\w\S*", text)


def test_prose_is_counted_without_code_and_tables() -> None:
    page = "# Two words\n```bash\nnot these\n```\n| nor | this |\n<!-- or that -->\n[a b](c/d) - x"
    assert prose(page) == ["Two", "words", "[a", "b](c/d)", "x"]


def test_prose_has_at_most_900_words() -> None:
    assert len(prose(TEXT)) <= 900


def test_a_reader_meets_things_in_this_order() -> None:
    order = ["demo.png", "make demo", "make test", "pip install", "FluxPipeline", "## Install"]
    order += ["## The operator", "nf.negtome(x", "## Pipelines and references", "nf.Reference("]
    order += ["## Results", "Not measured", "## Where to go next", "CONTRIBUTING.md"]
    places = [TEXT.index(one) for one in order]
    assert places == sorted(places)
    assert "pip install -e" in "".join(TEXT.splitlines(keepends=True)[:25])


def test_the_example_of_the_operator_runs() -> None:
    (code,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
        if "match_tokens" in block
    )
    generator = torch.Generator().manual_seed(0)
    x, reference = (torch.randn(shape, generator=generator) for shape in ((4, 9, 8), (6, 8)))
    names = {"nf": nf, "x": x, "reference": reference, "mask": torch.arange(6) < 3}
    exec(code, names)
    assert names["y"].shape == x.shape
    assert names["similarity"].shape == names["index"].shape == (4, 9)
    assert names["index"].dtype == torch.int64


def test_tables_are_those_of_the_results() -> None:
    assert readme.main(["--check"]) == 0


def test_missing_result_reads_not_measured(tmp_path: Path) -> None:
    marked = "<!-- begin: gpu -->\n| old |\n<!-- end: gpu -->"
    assert "not measured" in readme.render(marked, tmp_path)
    assert "old" not in readme.render(marked, tmp_path)
    rows = readme.render("<!-- begin: results -->\n<!-- end: results -->", tmp_path)
    assert rows.count("not measured") == 3


def test_unknown_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'speed'; known"):
        readme.render("<!-- begin: speed -->\n<!-- end: speed -->", tmp_path)


def test_figures_come_from_the_file(tmp_path: Path) -> None:
    record = json.loads((readme.RESULTS / "demo.json").read_text(encoding="utf-8"))
    record["results"][0]["guided"]["cosine"] = 0.1234
    (tmp_path / "demo.json").write_text(json.dumps(record))
    marked = "<!-- begin: demo -->\n<!-- end: demo -->"
    assert "0.123" in readme.render(marked, tmp_path)


def test_figures_of_the_three_rows_come_from_the_files(tmp_path: Path) -> None:
    record = json.loads((readme.RESULTS / "eval" / "diversity.json").read_text(encoding="utf-8"))
    for one in record["frontiers"]:
        one["ratio"] = [7.0, 6.0, 8.0]
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "diversity.json").write_text(json.dumps(record))
    rows = readme.render("<!-- begin: results -->\n<!-- end: results -->", tmp_path)
    assert "7.00 times [6.00, 8.00]" in rows
