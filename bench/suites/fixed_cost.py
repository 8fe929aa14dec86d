"""`python -m bench fixed-cost`: time of a guided block and a bare call with few tokens.

With few tokens the calls cost more than the arithmetic. For each shape, dtype and number of
threads these take turns on the same tokens: a block of a guided step (`Guidance.apply`, with its
share of beginning, ending and counting the step), `negtome`, and the authors' function. Ratios are
taken within a round. The authors' function serves the reference "first" alone; other modes are
timed without it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from negtome_fast import provenance

from .. import results
from ..compared import baselines
from ..drawn import tables
from ..timing import clock

Sizes = tuple[int, int, int]
SHAPES: tuple[Sizes, ...] = (
    (4, 64, 128),
    (4, 64, 160),
    (2, 64, 640),
    (4, 256, 640),
    (4, 256, 1280),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCKS = 6
"""Guided blocks in a step of the embedded model."""
MODES = ("first", "others", "first, 2 groups", "first, mask", "external")
OURS = ("block", "call")


def tokens(shape: Sizes, dtype: torch.dtype) -> Tensor:
    """Random items that resemble each other, so that most of their tokens are pushed."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, *shape[1:], generator=generator)
    return (common + 0.5 * torch.randn(shape, generator=generator)).to(dtype)


def _mean(call: Callable[[], object], calls: int) -> clock.Sampler:
    """Sampler of the mean of `calls` calls."""

    def sample() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    return sample


def _block(x: Tensor, reference: Any, groups: int, masked: bool) -> clock.Sampler:
    """Seconds of one block of a guided step, its share of the step's own work included.

    The call works in place on a copy that is made before the clock runs. The hook does the same
    with a block's output that no other code holds.
    """
    from negtome_fast.config import NegToMeConfig
    from negtome_fast.guidance import Guidance

    guidance = Guidance(NegToMeConfig(reference=reference, t_end=0.0))
    if masked:
        mask = torch.arange(x.shape[1]) % 2 == 0
        guidance.reference_mask = lambda grid: mask
    blocks = [f"blocks.{number}" for number in range(BLOCKS)]

    def sample() -> float:
        outputs = [x.clone() for _ in blocks]
        start = time.perf_counter()
        guidance.begin_step(500.0, groups=groups, grid=(1, x.shape[1]))
        for block, output in zip(blocks, outputs, strict=True):
            guidance.apply(output, block=block, inplace=True)
        guidance.end_step()
        return (time.perf_counter() - start) / BLOCKS

    return sample


def samplers(x: Tensor, mode: str) -> dict[str, clock.Sampler]:
    """Samplers of one mode: block, call, and the authors' function for "first"."""
    from negtome_fast.functional import negtome

    groups = 2 if mode.endswith("groups") else 1
    reference: Any = mode.split(",")[0]
    mask = torch.arange(x.shape[1]) % 2 == 0 if mode.endswith("mask") else None
    found: dict[str, clock.Sampler] = {}
    if reference == "external":
        reference = x[0].clone()
    else:
        found["block"] = _block(x, reference, groups, mask is not None)

    def call() -> Tensor:
        return negtome(x, reference, groups=groups, reference_mask=mask)

    found["call"] = _mean(call, BLOCKS)
    if mode in ("first", "first, 2 groups"):
        found["authors"] = _mean(lambda: baselines.authors(x, groups), BLOCKS)
    return found


@torch.no_grad()
def measure(
    shape: Sizes, dtype: str, mode: str, threads: int, seconds: float, max_rounds: int = 2000
) -> dict[str, Any]:
    """Measure seconds of each candidate, and ours over the authors' with 95% intervals."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        candidates = samplers(tokens(shape, DTYPES[dtype]), mode)
        for sample in candidates.values():
            for _ in range(clock.WARM_UP_ROUNDS):
                sample()
        taken = clock.interleave(candidates, seconds, min_rounds=6, max_rounds=max_rounds)
    finally:
        torch.set_num_threads(before)
    case: dict[str, Any] = {"shape": list(shape), "dtype": dtype, "mode": mode, "threads": threads}
    case["seconds"] = {name: clock.summarize(times).as_dict() for name, times in taken.items()}
    if "authors" in taken:
        case["of_authors"] = {}
        for name in OURS:
            pairs = zip(taken[name], taken["authors"], strict=True)
            case["of_authors"][name] = clock.median_interval([ours / its for ours, its in pairs])
    return case


def line(case: dict[str, Any]) -> list[str]:
    """Cells of one case, as in HEADER."""
    cells = ["x".join(map(str, case["shape"])), case["dtype"], case["mode"], str(case["threads"])]
    for name in (*OURS, "authors"):
        taken = case["seconds"].get(name)
        cells.append(tables.time_text(taken["median"]) if taken else "-")
    for name in OURS:
        ratio = case.get("of_authors", {}).get(name)
        text = "{median:.2f} [{low:.2f}, {high:.2f}]".format(**ratio) if ratio else "-"
        cells.append(text)
    return cells


HEADER = (
    "shape",
    "dtype",
    "mode",
    "threads",
    "block",
    "call",
    "authors'",
    "block / authors'",
    "call / authors'",
)


def _shape(text: str) -> Sizes:
    items, count, channels = (int(part) for part in text.split("x"))
    return items, count, channels


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="BxNxD")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each case; default: 1")
    parser.add_argument("--add", action="store_true", help="keep the other cases of the file")
    parser.add_argument("--out", type=Path, default=results.FOLDER / "fixed-cost-cpu.json")
    return parser


def _key(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case["shape"]), case["dtype"], case["mode"], case["threads"]


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench fixed-cost") -> int:
    """Measure all cases and return 0."""
    arguments = build_parser(prog).parse_args(argv)
    cases = [
        measure(shape, dtype, mode, threads, arguments.seconds)
        for shape in arguments.shapes
        for dtype in arguments.dtypes
        for mode in arguments.modes
        for threads in arguments.threads
    ]
    print("\n".join(tables.aligned([HEADER, *map(line, cases)])))
    if arguments.add and arguments.out.exists():
        known = {_key(case): case for case in results.load(arguments.out)["fixed_cost"]}
        cases = list((known | {_key(case): case for case in cases}).values())
    record = {"schema": 1, **provenance.describe(), "fixed_cost": cases}
    results.save(arguments.out, record)
    print(f"written to {arguments.out}")
    return 0
