"""`python -m bench`: the operator against the authors' function and a bare matmul, on this machine.

Writes a JSON file after every shape, so that a run that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import machine, report
from ._path import ROOT
from .candidates import CANDIDATES, OURS
from .measure import measure
from .shapes import CPU_SHAPES, GPU_SHAPES, QUICK_SHAPES, Shape, parse_shape, random_tokens

DTYPES = ("float32", "bfloat16", "float16")
SCHEMA = 1
#: One round of all candidates costs about this many times the multiply-adds of ours.
ROUND_COST = 5
MIN_ROUNDS = 6


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    others = [name for name in CANDIDATES if name != OURS]
    parser.add_argument("--quick", action="store_true", help="two small shapes, a minute")
    parser.add_argument(
        "--shape",
        action="append",
        type=_shape,
        metavar="BxNxD[/G]",
        help="measure this shape instead of the list; may be repeated",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, else float32")
    parser.add_argument("--threads", type=_positive(int), help="CPU threads of torch")
    parser.add_argument(
        "--against", nargs="*", choices=others, default=others, help="default: all of them"
    )
    parser.add_argument(
        "--seconds", type=_positive(float), help="time for the rounds of one shape; default 20"
    )
    parser.add_argument(
        "--deadline", type=_positive(float), help="begin no shape after so many seconds"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--name", help="the result is bench/results/NAME.json")
    parser.add_argument("--out", type=Path, help="the JSON file to write instead")
    return parser


def _shape(text: str) -> Shape:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(kind: type) -> Any:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < 1e9:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
        return value

    return convert


def _matmul_rate(dtype: torch.dtype) -> float:
    """Multiply-adds per second of a product on this CPU, to foresee what a shape will take."""
    x = random_tokens(Shape("rate", 2, 1024, 640), dtype, "cpu")
    torch.mm(x[1], x[0].T)
    start = time.perf_counter()
    torch.mm(x[1], x[0].T)
    return 1024 * 1024 * 640 / (time.perf_counter() - start)


def _too_much(shape: Shape, dtype: torch.dtype, device: torch.device, rate: float) -> str | None:
    """Why this shape does not fit the machine, or None."""
    if device.type == "cpu":
        rounds = 1 if shape.memory_only else MIN_ROUNDS
        seconds = rounds * ROUND_COST * shape.multiply_adds / rate
        return f"would take {seconds:.0f} s here" if seconds > 300 else None
    matrix = shape.items * shape.tokens**2 * dtype.itemsize
    wanted = 2 * matrix + 8 * shape.elements * dtype.itemsize
    free = torch.cuda.mem_get_info()[0]
    return f"needs {wanted / 2**30:.0f} GiB of GPU memory" if wanted > free else None


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_gpu else "float32"))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shapes: Sequence[Shape] = arguments.shape or (GPU_SHAPES if on_gpu else CPU_SHAPES)
    if arguments.quick and not arguments.shape:
        shapes = QUICK_SHAPES
    seconds = arguments.seconds or (1.0 if arguments.quick else 20.0)

    started = time.perf_counter()
    result = {"schema": SCHEMA, **machine.describe(), "device": device.type, "cases": []}
    if not on_gpu:
        # A GPU that is there but not measured has no place in the name or the reading.
        result["gpu"] = None
    name = arguments.name or f"{machine.slug(result)}-{result['date'][:10]}"
    out = arguments.out or ROOT / "bench" / "results" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    print(report.machine_line(result) + "\n")

    rate = 0.0 if on_gpu else _matmul_rate(dtype)
    for shape in shapes:
        reason = _too_much(shape, dtype, device, rate)
        if arguments.deadline and time.perf_counter() - started > arguments.deadline:
            reason = f"the deadline of {arguments.deadline:.0f} s is over"
        if reason:
            case = {
                "name": shape.name,
                "shape": str(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "multiply_adds": shape.multiply_adds,
                "skipped": reason,
            }
        else:
            with_memory = not arguments.no_memory
            case = measure(shape, dtype, device, arguments.against, seconds, with_memory)
        result["cases"].append(case)
        out.write_text(json.dumps(result, indent=1) + "\n")
        print("\n".join(report.case_lines(case)), flush=True)
    print(f"written to {out}")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where a result was wrong, or 2 for bad input."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("python -m bench: there is no CUDA device here", file=sys.stderr)
        return 2
    try:
        result = _run(arguments)
    except OSError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    return 1 if any("wrong" in case for case in result["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
