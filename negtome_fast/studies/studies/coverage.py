"""`python -m negtome_fast.studies.studies.coverage`: how often the bootstrap's intervals hold.

Simulates studies of two conditions with known distributions of attributes, and writes the share of
intervals that contain the true value as JSON. Takes a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..intervals import AttributeEntropy, paired_bootstrap

PROMPTS, SIZE, HEADS = 4, 8, ("skin", "hair_color", "hair_shape")
DIVERSE = np.array([0.4, 0.25, 0.15, 0.1, 0.05, 0.05])
SKEWED = np.array([0.9, 0.06, 0.02, 0.01, 0.005, 0.005])


def readings(rng: np.random.Generator, shares: np.ndarray, groups: int, spread: bool) -> list[Any]:
    """Draw the attributes of simulated images, a dictionary each.

    With `spread` the images of a group avoid each other, as guided images do.
    """
    columns = []
    for _ in HEADS:
        uniform = rng.random((PROMPTS * groups, SIZE))
        if spread:
            uniform = rng.permuted(np.tile(np.arange(SIZE), (len(uniform), 1)), axis=1) + uniform
            uniform /= SIZE
        columns.append(np.searchsorted(shares.cumsum()[:-1], uniform).ravel())
    return [dict(zip(HEADS, map(str, row), strict=True)) for row in zip(*columns, strict=True)]


def simulate(groups: int, spread: bool, runs: int) -> dict[str, Any]:
    """Simulate `runs` studies with `groups` groups a prompt, and count how many intervals hold."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, write the file, and return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m negtome_fast.studies.studies.coverage", description=__doc__
    )
    parser.add_argument("--runs", type=int, default=500, help="simulated studies a row")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("output/evaluation/coverage.json"),
        help="JSON file to write; default: %(default)s",
    )
    options = parser.parse_args(argv)
    rows = [simulate(n, spread, options.runs) for n in (2, 4, 8, 16) for spread in (True, False)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
