"""The most that this machine can do, measured in the run that is compared with it.

One ceiling is a large square product of random numbers, the other a copy that no cache holds
(bytes read and written).
"""

from __future__ import annotations

from typing import Any

import torch

from . import clock

SIZES = {"cuda": (8192, 2**30), "cpu": (1024, 2**27)}
"""Device -> (side of the product, bytes of the copy)."""
ROUNDS = 7


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which products are computed: on a CPU at least fp32."""
    return dtype if device.type == "cuda" else torch.promote_types(dtype, torch.float32)


def measure(
    dtype: torch.dtype, device: torch.device, sizes: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Measure TFLOP/s and bytes per second; the fastest of some rounds counts."""
    side, copied = sizes or SIZES[device.type]
    dtype = product_dtype(dtype, device)
    make = clock.cuda_sampler if device.type == "cuda" else clock.cpu_sampler
    generator = torch.Generator(device).manual_seed(0)
    squares = [
        torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(3)
    ]
    product = torch.empty_like(squares[0])
    multiply = make(lambda x: torch.mm(x, squares[2], out=product), squares[:2])
    source = torch.randn(copied // 4, generator=generator, device=device)
    target = torch.empty_like(source)
    copy = make(target.copy_, [source])
    best = {
        name: min(samples)
        for name, samples in clock.interleave(
            {"product": multiply, "copy": copy}, seconds=0.0, min_rounds=ROUNDS
        ).items()
    }
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_side": side,
        "matmul_tflops": 2 * side**3 / best["product"] / 1e12,
        "copy_bytes_per_second": 2 * source.nbytes / best["copy"],
    }
