"""`python docs/make_coverage.py`: how often the intervals of `evaluation.bootstrap` hold the truth.

Draws studies of two conditions from known distributions of attributes, and writes the table of
docs/measures.md and docs/coverage.json. A minute on one core. With --check nothing is drawn: exits
with 1 where the page's table is not that of the file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

DOCS = Path(__file__).resolve().parent
PAGE, FILE = DOCS / "measures.md", DOCS / "coverage.json"
TABLE = re.compile(r"(?<=<!-- begin: coverage -->\n).*?(?=\n<!-- end: coverage -->)", re.DOTALL)

PROMPTS, SIZE, HEADS = 4, 8, ("skin", "hair_color", "hair_shape")
DIVERSE = np.array([0.4, 0.25, 0.15, 0.1, 0.05, 0.05])
SKEWED = np.array([0.9, 0.06, 0.02, 0.01, 0.005, 0.005])


def readings(rng: np.random.Generator, shares: np.ndarray, groups: int, spread: bool) -> list[Any]:
    """What a reader sees; `spread`: images of a group avoid each other, as guided ones do."""
    columns = []
    for _ in HEADS:
        uniform = rng.random((PROMPTS * groups, SIZE))
        if spread:
            uniform = rng.permuted(np.tile(np.arange(SIZE), (len(uniform), 1)), axis=1) + uniform
            uniform /= SIZE
        columns.append(np.searchsorted(shares.cumsum()[:-1], uniform).ravel())
    return [dict(zip(HEADS, map(str, row), strict=True)) for row in zip(*columns, strict=True)]


def simulate(groups: int, spread: bool, runs: int) -> dict[str, Any]:
    """`runs` studies with `groups` groups a prompt, of which each has an interval."""
    from negtome_fast.studies.intervals import AttributeEntropy, paired_bootstrap

    rng = np.random.default_rng(0)
    diverse, skewed = (float(-np.dot(p, np.log(p))) for p in (DIVERSE, SKEWED))
    images = PROMPTS * groups * SIZE
    plan: dict[str, Any] = {
        "strata": [i // (groups * SIZE) for i in range(images)],
        "blocks": [i // SIZE for i in range(images)],
        "within_strata": True,
        "draws": 500,
    }
    ratios, differences = [], []
    for run in range(runs):
        pair = readings(rng, DIVERSE, groups, spread), readings(rng, SKEWED, groups, False)
        statistic = AttributeEntropy(HEADS)
        ratios.append(paired_bootstrap(statistic, *pair, compare="ratio", seed=run, **plan))
        differences.append(paired_bootstrap(statistic, *pair, seed=run, **plan))
    truth = diverse / skewed
    return {
        "groups": groups,
        "images": images,
        "spread": spread,
        "runs": runs,
        "truth": round(truth, 4),
        "estimate": round(float(np.mean([r.estimate for r in ratios])), 4),
        "corrected": round(float(np.mean([r.corrected for r in ratios])), 4),
        "covered": round(float(np.mean([r.contains(truth) for r in ratios])), 4),
        "above": round(float(np.mean([r.low > truth for r in ratios])), 4),
        "difference_covered": round(
            float(np.mean([d.contains(diverse - skewed) for d in differences])), 4
        ),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| groups a prompt | images | images of a group | mean estimate | mean corrected "
        "| ratio covered | wholly above | difference covered |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['groups']} | {r['images']} | {'spread' if r['spread'] else 'independent'} "
        f"| {r['estimate']:.2f} | {r['corrected']:.2f} | {r['covered']:.3f} | {r['above']:.3f} "
        f"| {r['difference_covered']:.3f} |"
        for r in rows
    ]
    first = rows[0]
    lines += ["", f"True ratio {first['truth']:.2f}; {first['runs']} simulated studies a row."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare page and file only")
    parser.add_argument("--runs", type=int, default=500, help="simulated studies a row")
    arguments = parser.parse_args(argv)
    page = PAGE.read_text(encoding="utf-8")
    if arguments.check:
        rows = json.loads(FILE.read_text(encoding="utf-8"))
        found = TABLE.search(page)
        if found is None or found.group() != table(rows):
            print(f"{PAGE.name} does not show {FILE.name}: run python docs/make_coverage.py")
            return 1
        return 0
    rows = [simulate(n, spread, arguments.runs) for n in (2, 4, 8, 16) for spread in (True, False)]
    FILE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(TABLE.sub(lambda _: table(rows), page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
