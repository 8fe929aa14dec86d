"""Tensor descriptors of tokens, which the tensor memory accelerator of Hopper and later reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def descriptor(tokens: Tensor, rows: int, channels: int) -> Any:
    """A descriptor of tokens (P, M, D) with blocks (1, rows, channels), or None.

    None where tensor maps cannot express the tokens: they need 16-byte aligned items and tokens,
    channels that follow each other, and items that do not interleave.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    items, length, width = tokens.shape
    stride_b, stride_n, stride_d = tokens.stride()
    if items == 1:
        stride_b = length * stride_n
    if length == 1:
        stride_n = stride_b
    size = tokens.element_size()
    if stride_b * size % 16 or stride_n * size % 16 or tokens.data_ptr() % 16 or stride_d != 1:
        return None
    if stride_n < width or stride_b < length * stride_n or stride_b % stride_n:
        return None
    if max(stride_b, stride_n) * size >= 2**40:
        return None
    strides = [stride_b, stride_n, stride_d]
    return TensorDescriptor(tokens, [items, length, width], strides, [1, rows, channels])
