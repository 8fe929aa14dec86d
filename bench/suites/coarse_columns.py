"""`python -m bench coarse-columns`: kind "coarse" against kind "tiles".

For each shape it prints the seconds of a call of either kind, taken in turns on the same inputs,
their ratio, and the number of columns and blocks of columns that the int8 bounds leave in question.
On a CPU, with TRITON_INTERPRET=1, small shapes rehearse it, and their times tell nothing about a
GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from negtome_fast import provenance

from .. import results
from ..compared.shapes import FLUX_1024, QWEN_1328, WAN_480, WAN_720, Shape, parse_shape
from ..timing import clock
from ..timing.measure import rotating_inputs

KINDS = ("tiles", "coarse")
SHAPES = (FLUX_1024, QWEN_1328, WAN_480, WAN_720)
REHEARSAL = (Shape("rehearsal", 2, 160, 128), Shape("rehearsal, groups", 4, 96, 64, groups=2))


def _call(kind: str, shape: Shape, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from negtome_fast.functional import guide_tokens
    from negtome_fast.tuner.measure import forced

    with forced(kind):
        return guide_tokens(x, "first", groups=shape.groups, backend="triton")


def measure(
    shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float = 3.0
) -> dict[str, Any]:
    """Measure times, their ratio (tiles / coarse, above 1 if coarse is faster) and columns.

    `alike` is the share of source tokens for which both kinds choose the same token; it is below 1
    only if two cosines differ by less than the rounding of a sum.
    """
    from ..compared.coarse_statistics import coarse_statistics

    inputs = rotating_inputs(shape, dtype, device)
    chosen = {kind: _call(kind, shape, inputs[0])[2] for kind in KINDS}
    sampler = clock.cuda_sampler if device.type == "cuda" else clock.cpu_sampler
    samplers = {kind: sampler(partial(_call, kind, shape), inputs) for kind in KINDS}
    rounds = 5 if device.type == "cuda" else 1
    samples = clock.interleave(samplers, seconds, min_rounds=rounds)
    return {
        "name": shape.name,
        "shape": str(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "rehearsal": device.type != "cuda",
        "seconds": {kind: clock.summarize(taken).as_dict() for kind, taken in samples.items()},
        "tiles_by_coarse": clock.pairwise_ratio(samples["tiles"], samples["coarse"]).as_dict(),
        "alike": float((chosen["tiles"] == chosen["coarse"]).double().mean()),
        "in_question": coarse_statistics(inputs[0], groups=shape.groups),
    }


def line(found: dict[str, Any]) -> str:
    """Text of a result of `measure`."""
    each = found["in_question"]
    times = ", ".join(
        f"{kind} {found['seconds'][kind]['median'] * 1e3:.3f} ms" for kind in found["seconds"]
    )
    return (
        f"{found['name']} ({found['shape']} {found['dtype']}): {times}, tiles / coarse "
        f"{found['tiles_by_coarse']['median']:.3f}; in question a row: columns "
        f"{each['columns_mean']:.2f} (at most {each['columns_max']}), blocks of "
        f"{each['block_columns']} {each['blocks_mean']:.2f} (at most {each['blocks_max']}); "
        f"undecided {each['undecided']:.1%} of the rows"
        + (" [interpreted: a rehearsal, no time]" if found["rehearsal"] else "")
    )


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench coarse-columns") -> int:
    """Print a line for each shape; return 0, or 2 if the kernels cannot run."""
    from negtome_fast.backends import triton_runtime

    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--shapes", nargs="+", type=parse_shape, help="such as 2x75600x5120")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=3.0, help="time of a shape; default: 3")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable, reason = triton_runtime.available(device)
    if not usable:
        print(f"{prog}: {reason}", file=sys.stderr)
        return 2
    shapes = options.shapes or (SHAPES if device.type == "cuda" else REHEARSAL)
    cases: list[dict[str, Any]] = []
    for shape in shapes:
        cases.append(measure(shape, getattr(torch, options.dtype), device, options.seconds))
        print(line(cases[-1]), flush=True)
        if options.out:  # after each shape, so that a run that is cut short keeps its results
            results.save(options.out, {**provenance.describe(), "coarse_columns": cases})
    if not options.out:
        print(json.dumps(cases))
    return 0
