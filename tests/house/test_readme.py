"""README.md: its length, its order, and its example of the operator."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import negtome_fast as nf

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
