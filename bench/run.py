"""`python -m bench [run]`: the operator against what it is to replace, on this machine.

Writes a JSON file after every shape, so that a run that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import ceilings, machine, plan, results, tables
from .candidates import CANDIDATES, OURS
from .measure import MIN_ROUNDS, measure
from .plan import Entry
from .shapes import Shape, parse_shape

DTYPES = ("float32", "bfloat16", "float16")
#: One round of all candidates costs about this many times the multiply-adds of ours.
ROUND_COST = 5
#: Seconds that a shape may take on a CPU; a longer one is skipped, and the reason written down.
LONGEST_SHAPE = 120.0
CPU_DEADLINE = 480.0


def build_parser(prog: str = "python -m bench run") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    others = [name for name in CANDIDATES if name != OURS]
    parser.add_argument("--quick", action="store_true", help="two small shapes, a minute")
    parser.add_argument(
        "--shape",
        action="append",
        type=_shape,
        metavar="BxNxD[/G]",
        help="measure this shape instead of the list; may be repeated",
    )
    parser.add_argument(
        "--series", nargs="+", choices=plan.SERIES, help="parts of the list; default: all of it"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, else float32")
    parser.add_argument("--threads", type=_positive(int), help="CPU threads of torch")
    parser.add_argument(
        "--against", nargs="*", choices=others, help="default: all of them, fewer in sweeps"
    )
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        help="time for the rounds of one shape; default 10, in sweeps 1",
    )
    parser.add_argument(
        "--deadline",
        type=_positive(float),
        help=f"begin no shape after so many seconds; default on a CPU {CPU_DEADLINE:.0f}",
    )
    parser.add_argument(
        "--longest",
        type=_positive(float),
        default=LONGEST_SHAPE,
        help="skip shapes that would take more seconds on a CPU; default %(default).0f",
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


def entries(arguments: argparse.Namespace, on_gpu: bool) -> list[Entry]:
    """What to measure, by the options."""
    if arguments.shape:
        return [Entry(shape) for shape in arguments.shape]
    if arguments.quick:
        return list(plan.QUICK)
    everything = plan.GPU if on_gpu else plan.CPU
    return [e for e in everything if not arguments.series or e.series in arguments.series]


def too_long(shape: Shape, limits: dict[str, Any], rounds: int, longest: float) -> str | None:
    """Why this shape does not fit into `longest` seconds on a CPU, or None."""
    rate = limits["matmul_tflops"] * 1e12
    seconds = rounds * ROUND_COST * 2 * shape.multiply_adds / rate
    return f"would take {seconds:.0f} s or more here" if seconds > longest else None


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    default_dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    seconds = arguments.seconds or (1.0 if arguments.quick else 10.0)
    deadline = arguments.deadline or (None if on_gpu else CPU_DEADLINE)
    others = [name for name in CANDIDATES if name != OURS]

    started = time.perf_counter()
    result = {"schema": results.SCHEMA, **machine.describe(), "device": device.type}
    if not on_gpu:
        # A GPU that is there but not measured has no place in the name or the reading.
        result["gpu"] = None
    name = arguments.name or f"{machine.slug(result)}-{result['date'][:10]}"
    out = arguments.out or results.FOLDER / f"{name}.json"
    print(tables.machine_line(result))
    limits = ceilings.measure(getattr(torch, default_dtype), device)
    result |= {"ceilings": limits, "complete": False, "cases": []}
    print(tables.ceilings_line(limits) + "\n")

    for entry in entries(arguments, on_gpu):
        shape = entry.shape
        dtype = arguments.dtype or entry.dtype or default_dtype
        reason = None if on_gpu else too_long(shape, limits, MIN_ROUNDS["cpu"], arguments.longest)
        if deadline and time.perf_counter() - started > deadline:
            reason = f"the deadline of {deadline:.0f} s is over"
        if reason:
            case = {
                "name": shape.name,
                "shape": str(shape),
                "dtype": dtype,
                "multiply_adds": shape.multiply_adds,
                "skipped": reason,
            }
        else:
            against = entry.against or others
            if arguments.against is not None:
                against = [name for name in against if name in arguments.against]
            case = measure(
                shape,
                getattr(torch, dtype),
                device,
                against,
                arguments.seconds or entry.seconds or seconds,
                entry.memory and not arguments.no_memory,
                limits,
            )
        result["cases"].append(case | {"series": entry.series})
        results.save(out, result)
        print("\n".join(tables.case_lines(case)), flush=True)
    result |= {"complete": True, "took_seconds": round(time.perf_counter() - started, 1)}
    results.save(out, result)
    print(f"written to {out}")
    return result


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench run") -> int:
    """0, or 1 where a result was wrong, or 2 for bad input."""
    arguments = build_parser(prog).parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(f"{prog}: there is no CUDA device here", file=sys.stderr)
        return 2
    try:
        result = run(arguments)
    except OSError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    return 1 if any("wrong" in case for case in result["cases"]) else 0
