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

    Compiling a kernel takes seconds and must not happen inside a CUDA-graph capture; afterwards
    calls with these shapes, this dtype and these arguments compile nothing and only launch. Nothing
    is tuned: configurations come from the tables (`negtome-fast tune` makes them).

    Args:
        shapes: `(B, N, D)` of the image tokens, as the operator will meet them. Sizes themselves
            are not compiled in, but they choose the configuration.
        dtype: of the tokens.
        device: of the tokens; None is the current CUDA device, or the CPU where there is none.
        arguments: as for `negtome`, such as `reference="others"` or `groups=2`.

    Raises:
        ValueError, TypeError: what `negtome` would refuse, or a shape that is not `(B, N, D)`.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if "inplace" in arguments:
        raise ValueError("warmup runs out of place and in place; leave out inplace")
    for shape in shapes:
        sizes = tuple(shape)
        if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"a shape must be (B, N, D), positive whole numbers, got {shape!r}")
        # Zeros have no cosine above a threshold and are not pushed; what is launched is the same.
        x = torch.zeros(sizes, dtype=dtype, device=device)
        for inplace in (False, True):
            negtome(x, inplace=inplace, **arguments)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
