"""`python -m bench.gpu.warm DEVICE SHAPE [TIMES] [KIND...]`: compiles the kernels of a shape.

Calls the operator TIMES times (default: once), both as it is timed and as it is checked, and skips
the kinds that failed. Processes for several shapes fill Triton's cache on disk together. The
profiler watches this program too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from ..compared.candidates import CANDIDATES, OURS
from ..compared.shapes import parse_shape, random_tokens
from ..timing.correctness import check
from ..timing.launches import choice, launching


def main(argv: Sequence[str]) -> int:
    """Return 0, or 1 if no way to launch is left."""
    device, text = argv[:2]
    times = int(argv[2]) if len(argv) > 2 else 1
    shape = parse_shape(text)
    way = choice(shape, argv[3:])
    if isinstance(way, str):
        print(way)
        return 1
    x = random_tokens(shape, torch.bfloat16, device)
    function = CANDIDATES[OURS].prepare(shape, x)
    with launching(*way):
        for _ in range(times):
            function(x)
        if times == 1:
            check(shape, x, rows=1)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{text}: compiled and called", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
