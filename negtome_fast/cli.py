"""The command `negtome-fast`: demo, info, bench. Bad input is one line on stderr, exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__

DEBUG_VARIABLE = "NEGTOME_FAST_DEBUG"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="negtome-fast",
        description="Steer diffusion models away from images, at inference time.",
        epilog=f"{DEBUG_VARIABLE}=1 shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="generate with and without guidance on the embedded model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--prompt", action="append", help="may be repeated; default: four prompts")
    demo.add_argument("--seed", type=int, default=0, help="of the first image")
    demo.add_argument("-n", "--images", type=int, default=8, help="images for each prompt")
    demo.add_argument("--alpha", type=float, help="push strength")
    demo.add_argument("--threshold", type=float, help="cosine similarity")
    demo.add_argument("--t-start", type=float, help="first timestep of the window, 1000 is noise")
    demo.add_argument("--t-end", type=float, help="last timestep of the window")
    demo.add_argument("--reference", choices=("first", "others"))
    demo.add_argument("--matching", choices=("paper", "official"))
    demo.add_argument("--backend", choices=("auto", "triton", "torch", "reference"))
    demo.add_argument("--guidance-scale", type=float, help="of classifier-free guidance")
    demo.add_argument("--steps", type=int, default=20, help="of the scheduler")
    demo.add_argument("--output", type=Path, default=Path("output/demo.png"), help="the picture")

    info = commands.add_parser("info", help="versions, devices, and the backend that is used")
    info.add_argument("--kernels", action="store_true", help="compile every kernel and report")
    info.add_argument("--json", action="store_true", help="as JSON")

    # Its words and options are those of `python -m bench`, which has its own parsers.
    commands.add_parser(
        "bench",
        help="run benchmarks, compare and report results (needs a checkout of the repository)",
        add_help=False,
    )
    return parser


def demo_command(options: argparse.Namespace) -> int:
    from . import demo
    from .models import GUIDANCE_SCALE

    names = ("alpha", "threshold", "t_start", "t_end", "reference", "matching", "backend")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}")
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


def info_command(options: argparse.Namespace) -> int:
    from . import info

    if options.kernels:
        from .kernels import aot

        rows = aot.report()
        print(json.dumps(rows, indent=1) if options.json else aot.table(rows))
        return int(any(aot.problems(row) for row in rows))
    print(json.dumps(info.collect(), indent=1) if options.json else info.text())
    return 0


def bench_command(arguments: Sequence[str]) -> int:
    """`python -m bench` of the checkout that this package is installed from (`pip install -e`)."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        raise RuntimeError(
            "the benchmarks are not part of the installed package; in a checkout of the "
            "repository: pip install -e . and this command, or python -m bench"
        )
    # First, so that no other module of that name is found.
    sys.path.insert(0, str(root))
    from bench.__main__ import main as bench_main

    return bench_main(arguments, prog="negtome-fast bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a bad report, 2 for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # What comes after "bench" is read by its own parsers.
    is_bench = arguments[:1] == ["bench"]
    options = build_parser().parse_args(arguments[:1] if is_bench else arguments)
    try:
        if is_bench:
            return bench_command(arguments[1:])
        return {"demo": demo_command, "info": info_command}[options.command](options)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"negtome-fast: error: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("negtome-fast: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
