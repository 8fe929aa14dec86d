"""`local_models`: no token of a model learns of any other, so that a changed pixel moves its own.

Attention returns its query, convolutions that overlap use the middle of their kernels alone, and
group norms return their input. No layout is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR_ATTENTION = (
    ("diffusers.models.attention_processor", "SanaLinearAttnProcessor2_0"),
    ("diffusers.models.transformers.transformer_sana_video", "SanaLinearAttnProcessor3_0"),
)
"""Processors that call no function for attention: module and class."""


@contextmanager
def local_models() -> Iterator[None]:
    """Make every model local while the context lasts."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", query_alone))
        stack.enter_context(mock.patch.object(F, "group_norm", lambda tokens, *_, **__: tokens))
        for name in ("conv2d", "conv3d"):
            convolve = middle_alone(getattr(F, name))
            stack.enter_context(mock.patch.object(F, name, convolve))
        for module, name in LINEAR_ATTENTION:
            stack.enter_context(mock.patch(f"{module}.{name}.__call__", projected_query))
        yield


def query_alone(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return the query in the value's number of channels."""
    channels = value.shape[-1]
    return query.repeat(*[1] * (query.ndim - 1), -(-channels // query.shape[-1]))[..., :channels]


def projected_query(processor: Any, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return what an attention module makes of its query alone."""
    hidden_states = attn.to_q(hidden_states)
    for layer in attn.to_out:
        hidden_states = layer(hidden_states)
    return hidden_states


def middle_alone(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a convolution that uses one tap of each axis along which its windows overlap."""

    def local(
        tokens: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, *rest: Any, **more: Any
    ) -> Tensor:
        sizes = weight.shape[2:]
        strides = (stride,) * len(sizes) if isinstance(stride, int) else stride
        kept = torch.ones_like(weight)
        for axis, (size, step) in enumerate(zip(sizes, strides, strict=True), start=2):
            if size > step:
                taps = torch.arange(size, device=weight.device) == size // 2
                kept = kept * taps.view(-1, *[1] * (weight.ndim - 1 - axis))
        return convolve(tokens, weight * kept, bias, stride, *rest, **more)

    return local
