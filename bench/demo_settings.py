"""`python -m bench.demo_settings`: the settings that the demo could use, on the embedded model.

Every style's open prompt, the same seeds for every setting; writes bench/results/demo_settings.json
and prints a table. A small comparison to choose the demo's default, not a study.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import machine
from ._path import ROOT

#: Guidance scale, and the settings of the guidance; None is no guidance.
SETTINGS: tuple[tuple[float, dict[str, Any] | None], ...] = (
    (2.5, None),
    (1.5, None),
    (2.5, {"reference": "first", "alpha": 0.9, "t_end": 900}),
    (2.5, {"reference": "first", "alpha": 0.9, "t_end": 900, "matching": "official"}),
    (2.5, {"reference": "first", "alpha": 0.9, "t_end": 750}),
    (2.5, {"reference": "others", "alpha": 0.5, "t_end": 900}),
    (2.5, {"reference": "others", "alpha": 0.9, "t_end": 900}),
    (2.5, {"reference": "others", "alpha": 0.5, "t_end": 750}),
    (2.5, {"reference": "others", "alpha": 0.9, "t_end": 750}),
    (1.5, {"reference": "others", "alpha": 0.5, "t_end": 750}),
)


def measure(scale: float, settings: dict[str, Any] | None, seeds: range) -> dict[str, float]:
    """Means over the four styles, a batch of `len(seeds)` images each."""
    from negtome_fast.config import NegToMeConfig
    from negtome_fast.demo import Studio
    from negtome_fast.models.avatars import STYLES, prompt_for
    from negtome_fast.pipelines import apply_negtome

    studio = Studio()
    if settings is not None:
        apply_negtome(studio.pipe, NegToMeConfig(threshold=0.65, t_start=1000, **settings))
    rows = []
    for style in STYLES:
        prompt = prompt_for(style)
        images, seconds = studio.draw(prompt, seeds, guidance_scale=scale)
        rows.append(studio.measure(images, prompt, seconds))
    return {
        name: sum(getattr(row, name) for row in rows) / len(rows)
        for name in ("cosine", "entropy", "agreement", "seconds")
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo_settings", description=__doc__)
    parser.add_argument("-n", "--images", type=int, default=32, help="for each style")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/demo_settings.json")
    options = parser.parse_args(argv)
    seeds = range(options.seed, options.seed + options.images)
    rows = []
    print(f"{'scale':>5}  {'guidance':<70}  cosine  entropy  prompt kept  s/image")
    for scale, settings in SETTINGS:
        row = measure(scale, settings, seeds)
        rows.append({"guidance_scale": scale, "guidance": settings, **row})
        words = "none" if settings is None else ", ".join(f"{k} {v}" for k, v in settings.items())
        print(
            f"{scale:>5}  {words:<70}  {row['cosine']:.3f}   {row['entropy']:.2f}     "
            f"{row['agreement']:>6.1%}      {row['seconds']:.3f}",
            flush=True,
        )
    record = {
        **machine.describe("cpu"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "images_per_style": options.images,
        "seed": options.seed,
        "torch": torch.__version__,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
