"""`negtome-fast tune`: search launch configurations on this GPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="search launch configurations on this GPU and write its tuning table",
        description="Measures on the current GPU; needs one, except with --dry-run.",
    )
    add = parser.add_argument
    add("--shapes", nargs="+", metavar="BxNxD[/GROUPS]", help="default: FLUX, SDXL, SD3 and Wan")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--quick", action="store_true", help="only the most promising configurations")
    add("--seconds", type=float, help="stop after this time; less than 300 implies --quick")
    add("--out", type=Path, help="file of the table; default: the package's table")
    add("--dry-run", action="store_true", help="compile and list, measure nothing")
    add("--arch", help="GPU that --dry-run compiles for, such as sm_90 (default) or gfx942")


def run(options: argparse.Namespace) -> int:
    from ...kernels import aot
    from ...tuner import run as tune
    from ...tuner.space import SHAPES, parse_shape

    shapes = [parse_shape(text) for text in options.shapes or ()] or list(SHAPES)
    if options.dry_run:
        arch = options.arch or "sm_90"
        if arch not in aot.TARGETS:
            raise ValueError(f"--arch must be one of {', '.join(aot.TARGETS)}, got {arch!r}")

        def announce(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        print(tune.dry_run(shapes, options.dtype, arch, options.quick, announce))
        return 0
    if options.arch:
        raise ValueError("--arch is for --dry-run; tuning is for the GPU that measures")
    if options.out is not None and options.out.is_dir():
        raise IsADirectoryError(f"--out {options.out} is a folder; give a file")

    def say(line: str) -> None:
        print(line, flush=True)

    path = tune.run(shapes, options.dtype, options.quick, options.out, options.seconds, say)
    print(f"written to {path}")
    return 0
