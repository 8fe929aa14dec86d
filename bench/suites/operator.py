"""`python -m bench [run]`: the operator against its rivals on this machine.

Writes a JSON file after every shape, so that a run that is cut short keeps its results.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from negtome_fast import provenance

from .. import results
from ..compared.candidates import CANDIDATES, OF_PACKAGES, OURS
from ..compared.shapes import Shape, parse_shape
from ..drawn import tables
from ..timing import ceilings
from ..timing.launches import KINDS, choice, launching
from ..timing.measure import MIN_ROUNDS, measure
from . import plan
from .plan import Entry

DTYPES = ("float32", "bfloat16", "float16")
ROUND_COST = 5
"""Multiply-adds of a round of all candidates, divided by those of ours."""
LONGEST_SHAPE = 120.0
"""Seconds that a shape may take on a CPU; a longer one is skipped with the reason."""
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
        "--against",
        nargs="*",
        choices=others,
        help="rivals; default: all but other packages, and fewer in sweeps",
    )
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        help="time for the rounds of one shape; default: 10, in sweeps 1",
    )
    parser.add_argument(
        "--deadline",
        type=_positive(float),
        help=f"begin no shape after this time; default on a CPU: {CPU_DEADLINE:.0f} s",
    )
    parser.add_argument(
        "--longest",
        type=_positive(float),
        default=LONGEST_SHAPE,
        help="skip shapes that would take longer on a CPU; default: %(default).0f s",
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument(
        "--case-limit",
        type=_positive(float),
        help="end with exit code 1 if a shape takes longer, because a kernel hangs; in seconds",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the shapes of the file, go on with others",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=KINDS,
        metavar="KIND",
        help="kinds of kernels that fail; shapes are launched in another way if there is one",
    )
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
    """The shapes to measure, by the options."""
    if arguments.shape:
        return [Entry(shape) for shape in arguments.shape]
    if arguments.quick:
        return list(plan.QUICK)
    everything = plan.GPU if on_gpu else plan.CPU
    return [e for e in everything if not arguments.series or e.series in arguments.series]


def too_long(shape: Shape, limits: dict[str, Any], rounds: int, longest: float) -> str | None:
    """Reason why a shape does not fit into `longest` seconds on a CPU, or None."""
    rate = limits["matmul_tflops"] * 1e12
    seconds = rounds * ROUND_COST * 2 * shape.multiply_adds / rate
    return f"would take {seconds:.0f} s or more here" if seconds > longest else None


class OperatorRun:
    """One run of the command: device, options and the file that it writes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        found = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(found)
        self.on_gpu = self.device.type == "cuda"
        self.dtype = arguments.dtype or ("bfloat16" if self.on_gpu else "float32")
        self.deadline = arguments.deadline or (None if self.on_gpu else CPU_DEADLINE)
        self.started = time.perf_counter()
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        self.result = {
            "schema": results.SCHEMA,
            **provenance.describe(),
            "device": self.device.type,
        }
        if not self.on_gpu:
            # A GPU that is not measured must not appear in the name or the text.
            self.result["gpu"] = None
        name = arguments.name or f"{provenance.slug(self.result)}-{self.result['date'][:10]}"
        self.out = arguments.out or results.FOLDER / f"{name}.json"
        self.limits: dict[str, Any] = {}

    def begin(self) -> None:
        """Measure the ceilings; with --resume keep the shapes of the file."""
        kept = self._resumed()
        print(tables.machine_line(self.result), flush=True)
        self.limits = ceilings.measure(getattr(torch, self.dtype), self.device)
        self.result |= {"ceilings": self.limits, "complete": False, "cases": kept}
        print(tables.ceilings_line(self.limits) + "\n", flush=True)

    def _resumed(self) -> list[dict[str, Any]]:
        if not self.arguments.resume or not self.out.exists():
            return []
        old = results.load(self.out)
        cases = list(old.get("cases", ()))
        running = old.get("running")
        if running:
            why = "the process ended while this was measured"
            cases.append(running | {"wrong": f"did not come back: {why}"})
        return cases

    def empty_case(self, entry: Entry) -> dict[str, Any]:
        """The fields that identify a case."""
        shape = entry.shape
        return {
            "name": shape.name,
            "shape": str(shape),
            "dtype": self.arguments.dtype or entry.dtype or self.dtype,
            "multiply_adds": shape.multiply_adds,
            "series": entry.series,
        }

    def skipped(self, entry: Entry) -> str | None:
        """Reason why a shape is not measured, or None."""
        if self.deadline and time.perf_counter() - self.started > self.deadline:
            return f"the deadline of {self.deadline:.0f} s is over"
        if self.on_gpu:
            return None
        return too_long(entry.shape, self.limits, MIN_ROUNDS["cpu"], self.arguments.longest)

    def measured(self, entry: Entry, dtype: str) -> dict[str, Any]:
        """Measure one shape; an exception gives a case that is `wrong`, with the traceback."""
        arguments = self.arguments
        against = entry.against or [n for n in CANDIDATES if n not in (OURS, *OF_PACKAGES)]
        if arguments.against is not None:
            # A sweep has few rivals; packages must be named.
            packages = [name for name in arguments.against if name in OF_PACKAGES]
            against = [name for name in against if name in arguments.against]
            against += packages if entry.against is None else []
        way = choice(entry.shape, arguments.without)
        if isinstance(way, str):
            return {"skipped": way}
        seconds = arguments.seconds or entry.seconds or (1.0 if arguments.quick else 10.0)
        try:
            with launching(*way) if arguments.without else contextlib.nullcontext():
                return measure(
                    entry.shape,
                    getattr(torch, dtype),
                    self.device,
                    against,
                    seconds,
                    entry.memory and not arguments.no_memory,
                    self.limits,
                    # `match_tokens` launches tiles, which may be broken.
                    matches=not arguments.without,
                )
        except Exception as error:
            # One shape must not cost the others.
            text = traceback.format_exc()
            print(text, flush=True)
            said = f"did not run: {type(error).__name__}: {error}".splitlines()[0]
            return {"wrong": said, "traceback": text}

    def take(self, entry: Entry) -> bool:
        """Add the case of one shape to the file; return False if the device is lost."""
        case = self.empty_case(entry)
        reason = self.skipped(entry)
        if reason:
            case["skipped"] = reason
        else:
            results.save(self.out, self.result | {"running": case})
            if self.arguments.case_limit:
                faulthandler.dump_traceback_later(self.arguments.case_limit, exit=True)
            case |= self.measured(entry, case["dtype"])
            faulthandler.cancel_dump_traceback_later()
        self.result["cases"].append(case)
        results.save(self.out, self.result)
        print("\n".join(tables.case_lines(case)), flush=True)
        return not ("traceback" in case and self._lost())

    def _lost(self) -> bool:
        if not self.on_gpu:
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the device is lost to this process: {error}", flush=True)
            return True
        return False


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what the options name; `lost` in the result tells that the device failed."""
    work = OperatorRun(arguments)
    work.begin()
    done = {results.case_key(case) for case in work.result["cases"]}
    for entry in entries(arguments, work.on_gpu):
        if results.case_key(work.empty_case(entry)) in done:
            continue
        if not work.take(entry):
            return work.result | {"lost": True}
    took = round(time.perf_counter() - work.started, 1)
    work.result |= {"complete": True, "took_seconds": took}
    results.save(work.out, work.result)
    print(f"written to {work.out}", flush=True)
    return work.result


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench run") -> int:
    """Return 0, 1 if a result was wrong, 2 for bad input, 3 if the device was lost."""
    arguments = build_parser(prog).parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(f"{prog}: there is no CUDA device here", file=sys.stderr)
        return 2
    try:
        result = run(arguments)
    except (OSError, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    if "lost" in result:
        return 3
    return 1 if any("wrong" in case for case in result["cases"]) else 0
