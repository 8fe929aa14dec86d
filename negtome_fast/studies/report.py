"""`negtome-fast eval report`: the results of all studies as one self-contained HTML page.

The page is made from the files of a folder alone. Tables and figures are drawn again from
`NAME.json`; sheets of images are the files `NAME-*.png`.
"""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .store import save_text
from .studies import STUDIES, own
from .studies.study import load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 1120px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { margin: 2.8rem 0 .3rem; font-size: 1.3rem; border-top: 3px solid #0b57d0; padding-top: .9rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
.facts { color: #444; font-size: .9rem; margin: .1rem 0; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .8rem; }
th, td { text-align: right; padding: .22rem .6rem; border-bottom: 1px solid #e3e3e3;
         white-space: nowrap; }
th { border-bottom: 2px solid #999; font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
nav a { margin-right: 1rem; color: #0b57d0; }
code { background: #f1f3f6; padding: 0 .25em; border-radius: 3px; font-size: .92em; }
.quick { color: #b00020; font-weight: 600; }
"""
ABOUT = (
    "The effect of guidance on the images of a diffusion model. Brackets and bars are 95% "
    "intervals of a bootstrap. It draws whole groups of images that were guided together, and the "
    "same groups on both sides of a comparison. All scores are in the JSON files beside this page."
)
ABOUT_EMBEDDED = (
    "{sections}: the embedded model tiny-flux-avatars, measured with image features and an "
    "attribute reader. One small model: what holds here need not hold on a large one in the same "
    "measure."
)
ABOUT_OWN = (
    "{section}: {model}, on prompts of its user. The true content of such images is unknown, so "
    "they are measured by image features and metrics of other libraries alone."
)


@dataclass(frozen=True)
class Section:
    """A section of the page for one kind of result; `studies.Study` explains the attributes."""

    name: str
    purpose: str
    table: Callable[[dict[str, Any]], str]
    figures: Callable[[dict[str, Any]], dict[str, Figure]]


SECTIONS = (
    *(Section(s.name, s.purpose, s.table, s.figures) for s in STUDIES.values()),
    Section(own.NAME, own.PURPOSE, own.table, own.figures),
)


def write(folder: Path) -> Path:
    """Write `report.html` from the results in `folder`, and return its path.

    A file that is no result of a study, such as one that is half written, is left out and named in
    a `UserWarning`.

    Raises:
        FileNotFoundError: the folder has no results.
        OSError: the page cannot be written.
    """
    shown = [(section, *found) for section in SECTIONS if (found := _shown(section, folder))]
    if not shown:
        raise FileNotFoundError(
            f"there are no results of studies in {folder}: run negtome-fast eval diversity first"
        )
    names = [section.name for section, _, _ in shown]
    links = "".join(f'<a href="#{name}">{name}</a>' for name in names)
    about = [ABOUT]
    embedded = [name for name in names if name != own.NAME]
    if embedded:
        about.append(ABOUT_EMBEDDED.format(sections=", ".join(embedded)))
    about += [text for _, text, _ in shown if text]
    paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in about)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>negtome-fast: evaluation</title><style>{STYLE}</style></head><body>"
        f"<h1>negtome-fast: evaluation</h1>{paragraphs}<nav>{links}</nav>"
        f"{''.join(section for _, _, section in shown)}</body></html>\n"
    )
    path = folder / "report.html"
    save_text(path, page)
    return path


def _shown(section: Section, folder: Path) -> tuple[str, str] | None:
    """Return the introduction of a section, or "", and its HTML; None without a usable result."""
    path = folder / f"{section.name}.json"
    if not path.exists():
        return None
    try:
        result = load(path)
        if result["study"] != section.name:
            raise ValueError(f"{path} is the result of {result['study']!r}")
        about = ""
        if section.name == own.NAME:
            about = ABOUT_OWN.format(section=section.name, model=result["settings"]["model"])
        return about, _section(section, result, folder)
    except ImportError:
        raise
    except Exception as error:  # a foreign file can fail anywhere in a table or a figure
        named = str(path) in str(error)
        reason = str(error) if named else f"{path} is not the whole result of a study: {error!r}"
        warnings.warn(f"skipped: {reason[:400]}", stacklevel=2)
        return None


def _section(study: Section, result: dict[str, Any], folder: Path) -> str:
    figures = study.figures(result)
    drawn = {f"{study.name}-{name}.png" for name in figures}
    pictures = sorted(folder.glob(f"{study.name}-*.png"))
    sheets = [path for path in pictures if path.name not in drawn and path.is_file()]
    facts = (
        f"{result['cpu']}, torch {result['versions']['torch']}, commit "
        f"{(result['commit'] or 'unknown')[:12]}, {result['date'][:10]}"
    )
    rehearsal = ""
    if "--quick" in result["command"]:
        rehearsal = '<p class="quick">A rehearsal: too few images for any conclusion.</p>'
    return (
        f'<h2 id="{study.name}">{study.name}: {html.escape(study.purpose)}</h2>'
        f'<p class="facts">{html.escape(facts)}</p>{rehearsal}'
        + "".join(_image(_png(figure), study.name) for figure in figures.values())
        + _html(study.table(result))
        + "".join(_image(path.read_bytes(), study.name) for path in sheets)
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _image(picture: bytes, name: str) -> str:
    data = base64.b64encode(picture).decode("ascii")
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'


def _html(markdown: str) -> str:
    """Return the studies' Markdown as HTML: paragraphs, tables, `code` and **bold**."""
    return "".join(
        _table(part.splitlines()) if part.startswith("|") else f"<p>{_inline(part)}</p>"
        for part in markdown.split("\n\n")
    )


def _table(lines: Sequence[str]) -> str:
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    top = "".join(f"<th>{_inline(cell)}</th>" for cell in head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in body
    )
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
