"""`python docs/make_nudging.py`: the tables and figures of docs/nudging.md, from the results.

They are those of `negtome-fast eval nudging` and `nudging-cost`; `--demo` first runs
`negtome-fast nudge` for the picture of the demonstration. With --check nothing is written: exits
with 1 where the page is not up to date.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))  # bench is not installed

from bench.marked import Tables, body_of, fill  # noqa: E402

PAGE = DOCS / "nudging.md"
PICTURES = DOCS / "pictures"
RESULTS = DOCS.parent / "bench" / "results" / "eval"
DEMO = "nudging-demo.json"


def study_table(result: dict[str, Any]) -> str:
    from negtome_fast.studies.studies import nudging

    return nudging.table(result)


def goal_table(result: dict[str, Any]) -> str:
    """The goal's parts, a model a row, for `nudge` and `both`."""
    from negtome_fast.studies.studies import nudging
    from negtome_fast.studies.studies.tables import markdown

    rows: list[list[str]] = []
    header: list[str] = []
    for method in ("nudge", "both"):
        for model, parts in nudging.goal(result, method).items():
            header = ["memorised by", "method", *parts]
            rows.append([model, method, *parts.values()])
    return markdown(header, rows)


def chance_line(result: dict[str, Any]) -> str:
    """How near ordinary avatars are to memorised images and to desired points."""
    near = "; ".join(
        f"{subject['label']}: {subject['ordinary_nearest_desired']:.3f}"
        for subject in result["subjects"]
    )
    shares = "; ".join(
        f"{subject['label']}: {subject['near_by_chance']:.1%}" for subject in result["subjects"]
    )
    return (
        "Of 400 balanced avatars that no model drew, so many lie within "
        f"{result['pixels_threshold']:g} of a memorised image by chance: {shares}. Other avatars "
        f"that fit the prompts are this far from the nearest desired point: {near}."
    )


def cost_table(result: dict[str, Any]) -> str:
    from negtome_fast.studies.studies import nudging

    return nudging.table_cost(result)


def demo_table(record: dict[str, Any]) -> str:
    from negtome_fast.studies.studies.tables import markdown

    rows = [
        [
            one["prompt"],
            f"{one['flagged_before']} of {len(one['attempts'])}",
            f"{one['flagged_after']} of {len(one['attempts'])}",
            ", ".join(str(count) for count in one["attempts"]),
        ]
        for one in record["prompts"]
    ]
    header = ["prompt", "flagged before", "flagged after", "generations of each image"]
    return markdown(header, rows)


TABLES: Tables = {
    "demo": (DEMO, demo_table),
    "study": ("nudging.json", study_table),
    "goal": ("nudging.json", goal_table),
    "chance": ("nudging.json", chance_line),
    "cost": ("nudging-cost.json", cost_table),
}


def render(text: str, results: Path = RESULTS) -> str:
    """`text` with every marked table rewritten from `results`.

    Raises:
        ValueError: a mark that names no table.
    """

    return fill(text, lambda name: body_of(name, TABLES, results))


def draw() -> None:
    """The figures of the study's result."""
    from negtome_fast.studies.studies import nudging

    path = RESULTS / "nudging.json"
    if path.is_file():
        for name, figure in nudging.STUDY.figures(json.loads(path.read_text())).items():
            figure.savefig(PICTURES / f"nudging-{name}.png")


def demonstrate() -> None:
    """Runs the command of the page and keeps its sheet and what the table needs of its record."""
    from negtome_fast.cli import main as command

    with tempfile.TemporaryDirectory() as folder:
        if command(["nudge", "--quiet", "--output", folder]) == 2:
            raise SystemExit("the demonstration failed")
        keep(Path(folder))


def keep(folder: Path) -> None:
    shutil.copy(folder / "sheet.png", PICTURES / "nudging-demo.png")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    kept = {
        "filters": record["filters"],
        "versions": record["versions"],
        "prompts": [
            {
                "prompt": one["prompt"],
                "flagged_before": one["flagged_before"],
                "flagged_after": one["flagged_after"],
                "attempts": [len(rows) for rows in one["attempts"]],
            }
            for one in record["prompts"]
        ],
    }
    (RESULTS / DEMO).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python docs/make_nudging.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--demo", action="store_true", help="run the demonstration first")
    options = parser.parse_args(argv)
    text = PAGE.read_text(encoding="utf-8")
    if options.check:
        current = render(text) == text
        if not current:
            print(f"{PAGE.name} is not up to date: python docs/make_nudging.py", file=sys.stderr)
        return int(not current)
    if options.demo:
        demonstrate()
    draw()
    PAGE.write_text(render(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
