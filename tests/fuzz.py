"""`python -m tests.fuzz`: run random and adversarial problems against an fp64 oracle.

    python -m tests.fuzz --problems 1000000 --seed 1    as many problems, in two processes
    python -m tests.fuzz --only 4711                    one problem again

The suite runs the first 10,000; `make fuzz` is meant for releases.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

CHUNK = 500


def failures(start: int, count: int, triton: bool) -> list[str]:
    """Run `count` problems from number `start` on, and return the errors."""
    import torch

    from helpers.fuzz_run import check_seed

    torch.set_num_threads(1)
    found = []
    for seed in range(start, start + count):
        try:
            check_seed(seed, triton)
        except AssertionError as error:
            found.append(str(error))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--problems", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first problem")
    parser.add_argument("--only", type=int, help="run this problem alone")
    parser.add_argument("--triton", action="store_true", help="use the interpreted kernels")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    given = parser.parse_args()
    start, count = (given.seed, given.problems) if given.only is None else (given.only, 1)
    chunks = range(start, start + count, CHUNK)
    sizes = [min(CHUNK, start + count - first) for first in chunks]
    begun, done, errors = time.monotonic(), 0, 0
    run = partial(failures, triton=given.triton)
    with ProcessPoolExecutor(given.processes) as pool:
        for size, found in zip(sizes, pool.map(run, chunks, sizes), strict=True):
            done, errors = done + size, errors + len(found)
            for error in found:
                print(error, end="\n\n", flush=True)
            if done == count or done % (20 * CHUNK) == 0:
                spent = time.monotonic() - begun
                print(f"{done} problems, {errors} failures, {spent:.0f} s", flush=True)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
