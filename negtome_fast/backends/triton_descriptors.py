"""Tensor descriptors of tokens, for the tensor memory accelerator of Hopper and later GPUs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..kernels.tuning import Config


class _NoTokens:
    """Stand-in for tokens of a dtype while a descriptor is checked."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 0


@functools.lru_cache(maxsize=1024)
def template(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    rows: int,
    channels: int,
) -> Any:
    """A descriptor without its tokens, or None; see `descriptor`.

    Triton checks a descriptor when it is made, which takes longer than a launch; so templates are
    cached, and `with_tokens` fills in the tokens.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    items, length, width = shape
    stride_b, stride_n, stride_d = strides
    if items == 1:
        stride_b = length * stride_n
    if length == 1:
        stride_n = stride_b
    size = dtype.itemsize
    if stride_b * size % 16 or stride_n * size % 16 or stride_d != 1:
        return None
    if stride_n < width or stride_b < length * stride_n or stride_b % stride_n:
        return None
    if max(stride_b, stride_n) * size >= 2**40:
        return None
    block = [1, rows, channels]
    return TensorDescriptor(_NoTokens(dtype), list(shape), [stride_b, stride_n, stride_d], block)


def descriptor(tokens: Tensor, rows: int, channels: int) -> Any:
    """A descriptor of tokens (P, M, D) with blocks (1, rows, channels), or None.

    It is None if tensor maps cannot express the tokens: these need 16-byte aligned items and
    tokens, contiguous channels, and items that do not interleave.
    """
    if tokens.data_ptr() & 15:
        return None
    made = template(tuple(tokens.shape), tokens.stride(), tokens.dtype, rows, channels)
    return None if made is None else with_tokens(made, tokens)


def with_tokens(made: Any, tokens: Tensor) -> Any:
    """Fill a template with `tokens`, which must begin at a multiple of 16 bytes."""
    found = object.__new__(type(made))
    found.__dict__.update(made.__dict__, base=tokens)
    return found


def descriptors(rows: Tensor, columns: Tensor, config: Config) -> tuple[Any, Any]:
    """Descriptors of both sides of a product; (None, None) if either has none."""
    if not config.DESCRIPTORS:
        return None, None
    row = descriptor(rows, config.BLOCK_M, config.BLOCK_K)
    column = None if row is None else descriptor(columns, config.BLOCK_N, config.BLOCK_K)
    return (None, None) if column is None else (row, column)
