"""`negtome_fast.warmup`: compile ahead of time what the operator will launch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .functional import negtome


@torch.no_grad()
def warmup(
    shapes: Iterable[tuple[int, int, int]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    **arguments: Any,
) -> None:
    """Run the operator once on tokens of every shape, out of place and in place, and wait.

    Compiling a kernel takes seconds and must not happen inside a CUDA-graph capture. Afterwards,
    calls with these shapes, this dtype and these arguments compile nothing. Nothing is tuned:
    configurations come from the tuning tables.

    Args:
        shapes: `(B, N, D)` of the image tokens of later calls. Sizes are not compiled in, but they
            choose the configuration.
        dtype: dtype of the tokens; default bf16, in which most models compute.
        device: device of the tokens; None is the current CUDA device, or the CPU without one.
        arguments: keyword arguments of `negtome`, such as `reference="others"` or `groups=2`.

    Raises:
        ValueError, TypeError: `negtome` would refuse an argument, or a shape is not `(B, N, D)`.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if "inplace" in arguments:
        raise ValueError("warmup runs both in place and out of place; leave out inplace")
    for shape in shapes:
        sizes = tuple(shape)
        if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"a shape must be (B, N, D), positive whole numbers, got {shape!r}")
        # Zeros suffice: launches do not depend on values.
        x = torch.zeros(sizes, dtype=dtype, device=device)
        for inplace in (False, True):
            negtome(x, inplace=inplace, **arguments)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
