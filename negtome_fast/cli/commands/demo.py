"""`negtome-fast demo`: images with and without guidance on the embedded model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="generate with and without guidance on the embedded model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--prompt", action="append", help="may be repeated; default: four prompts")
    add("--seed", type=int, default=0, help="seed of the first image")
    add("-n", "--images", type=int, default=8, help="images of each prompt")
    add("--alpha", type=float, help="strength of the push")
    add("--threshold", type=float, help="cosine similarity of a match")
    add("--t-start", type=float, help="first timestep of the window, 1000 is noise")
    add("--t-end", type=float, help="last timestep of the window")
    add("--reference", choices=("first", "others"))
    add("--matching", choices=("paper", "official"))
    add("--backend", choices=("auto", "triton", "torch", "reference"))
    add("--guidance-scale", type=float, help="scale of classifier-free guidance")
    add("--steps", type=int, default=20, help="steps of the scheduler")
    add("--output", type=Path, default=Path("output/demo.png"), help="the picture")


def run(options: argparse.Namespace) -> int:
    from ...models import GUIDANCE_SCALE
    from ...studies import demo

    names = ("alpha", "threshold", "t_start", "t_end", "reference", "matching", "backend")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.output.suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png, got {options.output}")
    results = demo.run(
        prompts=options.prompt or demo.PROMPTS,
        config=demo.CONFIG.with_overrides(**chosen),
        seed=options.seed,
        count=options.images,
        output=options.output,
        guidance_scale=GUIDANCE_SCALE if options.guidance_scale is None else options.guidance_scale,
        steps=options.steps,
    )
    print(demo.table(results))
    print(f"picture: {options.output}, figures: {options.output.with_suffix('.json')}")
    return 0
