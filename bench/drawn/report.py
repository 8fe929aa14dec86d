"""`python -m bench report [FILES]`: one HTML page that needs nothing else, and the plots as PNG.

Every result file is a section: the machine, the ceilings, speed-ups, roofline, growth, end to end,
and a table of all cases. Cases that were wrong or not measured are listed with the reason.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import results
from .._path import ROOT
from . import plots, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 1080px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin: 2.6rem 0 .3rem; font-size: 1.3rem;
       border-top: 3px solid #0b57d0; padding-top: .9rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
img { max-width: 100%; height: auto; display: block; margin: .8rem 0; }
.facts { color: #444; font-size: .92rem; margin: .1rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .78rem; width: 100%; }
th, td { text-align: right; padding: .2rem .4rem; border-bottom: 1px solid #e3e3e3;
         white-space: nowrap; }
th { border-bottom: 2px solid #999; font-weight: 600; } th:first-child, td:first-child,
td.why { text-align: left; }
td.case { font-weight: 600; padding-top: .8rem; text-align: left; }
tr.ours td { color: #0b57d0; font-weight: 600; }
.wrong { color: #b00020; font-weight: 600; } ul.left { font-size: .9rem; }
"""
INTRODUCTION = (
    "Times are medians of candidates that took turns on the same tensors in one process; ratios "
    "are taken within a round, and error bars and bands run from the 20th to the 80th percentile. "
    "Every result was checked against fp64 first; a wrong one has no time. Extra memory is the "
    "peak beyond input and result."
)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(header: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table of rows (class of the row, cells); a single cell spans the whole row."""
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = []
    for kind, cells in rows:
        if len(cells) == 1:
            body.append(f'<tr><td class="case" colspan="{len(header)}">{_text(cells[0])}</td></tr>')
            continue
        inside = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        body.append(f'<tr class="{kind}">{inside}</tr>')
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def case_table(cases: Sequence[dict[str, Any]]) -> str:
    """Every candidate of every measured case."""
    rows: list[tuple[str, Sequence[str]]] = []
    for case in cases:
        heading = f"{case['name']}: {case['shape']} {case['dtype']} ({tables.checked_text(case)})"
        rows += [("", [heading]), *tables.candidate_rows(case, reasons=True)]
    return _table(tables.COLUMNS, rows)


def end_to_end_table(models: Sequence[dict[str, Any]]) -> str:
    """Every method of every model that was measured end to end."""
    rows: list[tuple[str, Sequence[str]]] = []
    for model in models:
        how = "timed" if model["run"]["measured"] else "added up from its steps"
        heading = (
            f"{model['name']}: {model['images']} images, {model['guided_steps']} of "
            f"{model['steps']} steps guided; the whole run is {how}"
        )
        rows += [("", [heading]), *tables.method_rows(model)]
    header = ("", "a step", "added to it", "share [interval]", "added to an image", "share")
    return _table(header, rows)


def left_out(cases: Sequence[dict[str, Any]]) -> str:
    """A list of the cases without figures, with the reasons."""
    items = []
    for case in cases:
        name = f"{_text(case['shape'])} {_text(case['dtype'])}"
        if "wrong" in case:
            items.append(f'<li class="wrong">{name}: WRONG, {_text(case["wrong"])}</li>')
        elif "skipped" in case:
            items.append(f"<li>{name}: not measured, {_text(case['skipped'])}</li>")
    return f'<ul class="left">{"".join(items)}</ul>' if items else ""


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def _facts(result: dict[str, Any], part: dict[str, Any] | None) -> str:
    commit = result.get("commit") or "unknown"
    changed = result.get("changed_files")
    lines = [tables.machine_line(result), f"Measured {result['date']} at commit {commit[:12]}"]
    if changed:
        lines[1] += f" with {changed} changed files"
    if result.get("rehearsal") or result.get("tiny"):
        lines.append("A rehearsal with tiny sizes: no figure here says anything about speed.")
    if result.get("cut_short"):
        lines.append("Time ran out before the end.")
    if part and part.get("ceilings"):
        lines.append(tables.ceilings_line(part["ceilings"]))
    return "".join(f'<p class="facts">{_text(line)}</p>' for line in lines)


def section(name: str, result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """HTML of one result file, and its plots as PNG by name."""
    part, models = results.micro(result), results.end_to_end(result)
    figures: dict[str, Figure | None] = {}
    if part:
        figures = {
            "speed-ups": plots.speed_ups(part),
            "roofline": plots.roofline(part),
            "growth": plots.growth(part),
            "sweeps": plots.sweeps(part),
        }
    figures["end-to-end"] = plots.end_to_end(models)
    images = {f"{name}-{key}": _png(figure) for key, figure in figures.items() if figure}
    body = [f"<h2>{_text(name)}</h2>", _facts(result, part)]
    for title, image in images.items():
        code = base64.b64encode(image).decode()
        body.append(f'<img alt="{_text(title)}" src="data:image/png;base64,{code}">')
    if models:
        body += ["<h3>End to end</h3>", end_to_end_table(models)]
    if part:
        figured = [c for c in part["cases"] if not {"skipped", "wrong"} & c.keys()]
        body += ["<h3>All cases</h3>", case_table(figured), left_out(part["cases"])]
    skipped = result.get("skipped", {})
    for stage in result.get("stages", {}).values():
        skipped = skipped | (stage.get("result") or {}).get("skipped", {})
    body += [f"<p>{_text(model)}: not measured, {_text(why)}</p>" for model, why in skipped.items()]
    return "\n".join(body), images


def write(files: Sequence[Path], out: Path) -> list[Path]:
    """Write the page and the plots, and return their paths.

    Raises:
        ValueError: a file is not a result.
        ImportError: matplotlib is not installed.
    """
    sections: list[str] = []
    images: dict[str, bytes] = {}
    for path in files:
        body, found = section(path.stem, results.load(path))
        sections.append(body)
        images |= found
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.html"
    page.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>negtome-fast: benchmarks</title><style>{STYLE}</style></head><body>"
        f"<h1>negtome-fast: benchmarks</h1><p>{_text(INTRODUCTION)}</p>"
        + "\n".join(sections)
        + "</body></html>\n",
        encoding="utf-8",
    )
    written = [page]
    for name, image in images.items():
        written.append(out / f"{name}.png")
        written[-1].write_bytes(image)
    return written


def shipped() -> list[Path]:
    """The result files of the repository."""
    found = []
    for path in sorted(results.FOLDER.glob("*.json")):
        try:
            result = results.load(path)
        except ValueError:
            continue  # a result of the demo or of a study
        if results.micro(result) or results.end_to_end(result):
            found.append(path)
    return found


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench report") -> int:
    """Return 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "files", nargs="*", type=Path, help="result files; default: those in bench/results"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "output" / "bench", help="folder; default output/bench"
    )
    arguments = parser.parse_args(argv)
    files = arguments.files or shipped()
    try:
        if not files:
            raise ValueError("there are no results yet: python -m bench run")
        written = write(files, arguments.out)
    except (OSError, ValueError, ImportError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    print("\n".join(str(path) for path in written))
    return 0
