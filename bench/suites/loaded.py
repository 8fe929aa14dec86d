"""`python -m bench loaded`: times on a machine whose processors are busy with other processes.

Ours with one thread and with several, the authors' function and the bare matmul take turns, first
on the machine as it is, then beside one busy process for each processor. The busy processes only
count, and end with this process or after a time. A shape that is measured again replaces its case
in the file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from negtome_fast import provenance

from .. import results
from ..compared.candidates import CANDIDATES, OURS
from ..compared.shapes import (
    FLUX_768,
    SDXL_32_ONE_GROUP,
    SDXL_64_ONE_GROUP,
    Shape,
    parse_shape,
    random_tokens,
)
from ..drawn import tables
from ..timing import clock, correctness

CASES = (
    (SDXL_64_ONE_GROUP, "float32"),
    (SDXL_32_ONE_GROUP, "float32"),
    (FLUX_768, "bfloat16"),
)
"""Default shapes and dtypes."""
CONTESTANTS = {
    "ours": (OURS, None),
    "ours, 1 thread": (OURS, 1),
    "authors": ("authors", None),
    "matmul": ("matmul", None),
}
"""Name in the result -> (candidate, threads); None is the number from the options."""
TARGETS = {"ours, 1 thread": 1.5, "authors": 2.0}
"""Upper limit of our time over one thread's, and lower limit of the authors' time over ours."""
MIN_ROUNDS = 3
LONGEST = 600
"""Seconds after which a busy process ends."""
BUSY = """
import os, sys, time
parent, end = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
print("busy", flush=True)
while time.monotonic() < end and os.getppid() == parent:
    for _ in range(100000):
        pass
"""


@contextmanager
def busy_processes(count: int, seconds: float = LONGEST) -> Iterator[None]:
    """Run `count` busy processes until the end of the block, for at most `seconds`."""
    words = [sys.executable, "-S", "-c", BUSY, str(os.getpid()), str(seconds)]
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen(words, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
        yield


def _sampler(name: str, threads: int, shape: Shape, inputs: list[Tensor]) -> clock.Sampler:
    """Sampler of one call; the number of threads is set before the clock starts."""
    function = CANDIDATES[name].prepare(shape, inputs[0])
    calls = 0

    def sample() -> float:
        nonlocal calls
        calls += 1
        torch.set_num_threads(threads)
        start = time.perf_counter()
        function(inputs[calls % len(inputs)])
        return time.perf_counter() - start

    sample()
    return sample


def measure(
    shape: Shape, dtype: torch.dtype, seconds: float, threads: int, busy: int
) -> dict[str, Any]:
    """Time one shape without and with `busy` other processes; ratios are taken within a round."""
    inputs = [random_tokens(shape, dtype, "cpu", seed) for seed in range(2)]
    case: dict[str, Any] = {"shape": str(shape), "dtype": str(dtype).removeprefix("torch.")}
    correctness.check(shape, inputs[0])
    samplers = {
        name: _sampler(candidate, number or threads, shape, inputs)
        for name, (candidate, number) in CONTESTANTS.items()
    }
    for state, count in (("idle", 0), ("loaded", busy)):
        with busy_processes(count):
            samples = clock.interleave(samplers, seconds, MIN_ROUNDS)
        case[state] = {
            name: {
                "seconds": clock.summarize(taken).as_dict(),
                "times_ours": clock.pairwise_ratio(taken, samples["ours"]).as_dict(),
            }
            for name, taken in samples.items()
        }
    return case


def missed(case: dict[str, Any]) -> list[str]:
    """The targets that a case misses under load, as text."""
    over = {name: entry["times_ours"]["median"] for name, entry in case["loaded"].items()}
    found = []
    if 1 / over["ours, 1 thread"] > TARGETS["ours, 1 thread"]:
        found.append(f"{1 / over['ours, 1 thread']:.2f} times the time of one thread")
    if over["authors"] < TARGETS["authors"]:
        found.append(f"authors' / ours {over['authors']:.2f}")
    return found


def _lines(case: dict[str, Any]) -> Iterator[str]:
    for state in ("idle", "loaded"):
        entries = (
            f"{name} {tables.time_text(entry['seconds']['median'])}"
            f" ({entry['times_ours']['median']:.2f})"
            for name, entry in case[state].items()
        )
        yield f"{case['shape']} {case['dtype']}, {state}: {'; '.join(entries)}"


def _earlier_cases(path: Path, described: dict[str, Any]) -> list[dict[str, Any]]:
    """Cases of the file from the same machine and the same code."""
    if not path.exists():
        return []
    earlier = results.load(path)
    same = all(
        earlier.get(key) == described[key] for key in ("cpu", "threads", "versions", "commit")
    )
    return list(earlier["loaded"]) if same else []


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "--shape", type=parse_shape, metavar="BxNxD[/G]", help="measure this shape alone"
    )
    parser.add_argument("--dtype", default="float32", help="dtype of --shape; default: %(default)s")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="time of a shape in each state; default: 20",
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch; default: 2")
    parser.add_argument("--busy", type=int, help="busy processes; default: one a processor")
    parser.add_argument("--out", type=Path, default=results.FOLDER / "loaded-cpu.json")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench loaded") -> int:
    """Return 0, or 1 if a target is missed."""
    arguments = build_parser(prog).parse_args(argv)
    cases: Sequence[tuple[Shape, str]] = CASES
    if arguments.shape:
        cases = [(arguments.shape, arguments.dtype)]
    torch.set_num_threads(arguments.threads)
    busy = arguments.busy if arguments.busy is not None else os.cpu_count() or 1
    described = provenance.describe() | {"gpu": None, "busy_processes": busy}
    found = _earlier_cases(arguments.out, described)
    code = 0
    for shape, dtype in cases:
        case = measure(shape, getattr(torch, dtype), arguments.seconds, arguments.threads, busy)
        key = results.case_key(case)
        places = [number for number, old in enumerate(found) if results.case_key(old) == key]
        found[slice(places[0], places[0] + 1) if places else slice(len(found), None)] = [case]
        results.save(arguments.out, {"schema": 1, **described, "loaded": found})
        print("\n".join(_lines(case)), flush=True)
        for reason in missed(case):
            print(f"target missed: {reason}", file=sys.stderr)
            code = 1
    return code
