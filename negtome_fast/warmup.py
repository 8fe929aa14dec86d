"""`negtome_fast.warmup`: compile ahead of time what the operator will launch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch

from .functional import negtome

MOST_ELEMENTS = 2**40
"""Largest number of elements of a shape, more than a device holds."""


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
    device = _device(device)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a dtype of torch, got {type(dtype).__name__}")
    if "inplace" in arguments:
        raise ValueError("warmup runs both in place and out of place; leave out inplace")
    for sizes in [_sizes(shape) for shape in _listed(shapes)]:
        # Zeros suffice: launches do not depend on values.
        x = torch.zeros(sizes, dtype=dtype, device=device)
        for inplace in (False, True):
            negtome(x, inplace=inplace, **arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device {device!r:.80} is not a device of torch here") from error


def _listed(shapes: Any) -> list[Any]:
    try:
        if not isinstance(shapes, (str, bytes, dict, torch.Tensor)):
            return list(shapes)
    except TypeError:
        pass
    raise TypeError(f"shapes must be shapes (B, N, D), got {type(shapes).__name__}")


def _sizes(shape: Any) -> tuple[int, ...]:
    wrong = ValueError(f"a shape must be (B, N, D), positive whole numbers, got {shape!r:.80}")
    if not isinstance(shape, (tuple, list)) or len(shape) != 3:
        raise wrong
    for size in shape:
        if isinstance(size, bool) or not isinstance(size, Integral) or not 0 < int(size) < 2**31:
            raise wrong
    if math.prod(map(int, shape)) > MOST_ELEMENTS:
        raise ValueError(f"the shape {shape!r} has more than {MOST_ELEMENTS:,} elements")
    return tuple(map(int, shape))
