"""What this machine can do at most, measured in the run that it is compared with.

A large square product of random numbers, and a copy that no cache holds (bytes read + written).
"""

from __future__ import annotations

from typing import Any

import torch

from . import clock

#: (side of the product, bytes of the copy).
SIZES = {"cuda": (8192, 2**30), "cpu": (1024, 2**27)}
ROUNDS = 7


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that products are computed in: on a CPU never less than fp32."""
    return dtype if device.type == "cuda" else torch.promote_types(dtype, torch.float32)


def measure(
    dtype: torch.dtype, device: torch.device, sizes: tuple[int, int] | None = None
) -> dict[str, Any]:
    """TFLOP/s and bytes per second, the fastest of some rounds."""
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
