"""The operator on Triton: allocates memory and launches the kernels of `kernels/`.

Paper matching with combine="nearest" computes column scales and then, as the tuning table says,
either one fused launch, in which programs own rows, or tiles and a push. Everything else is scales,
tiles, similarities, push. A call is a list of launches, made ready first. Nothing here waits for
the device, and inputs are read with the strides that they have; so every call can be captured in a
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from . import triton_coarse
from . import triton_runtime as runtime
from .triton_descriptors import with_tokens
from .triton_geometry import Geometry, Push, geometry
from .triton_streams import SideStream

#: A launch and its arguments.
Step = tuple[Callable[..., None], tuple[Any, ...]]


# ---------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------
def _bytes(mask: Tensor | None) -> Tensor | None:
    """A boolean mask as bytes, without a copy."""
    return None if mask is None else mask.view(torch.uint8)


def _per_slot(values: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """`alpha` and `threshold` as launch arguments, and their strides over the slots.

    Numbers that the host knows are arguments of the launch; others are read on the device.
    """
    alpha, threshold = values
    if alpha.is_cpu and threshold.is_cpu and alpha.numel() == threshold.numel() == 1:
        return (alpha.item(), threshold.item()), (0, 0)
    there = tuple(value.to(x.device, torch.float32) for value in values)
    return there, tuple(value.stride(0) if value.numel() > 1 else 0 for value in there)


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte of `tensor` in memory and the byte after its last."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False
    (a_start, a_end), (b_start, b_end) = _span(a), _span(b)
    return a_start < b_end and b_start < a_end


def _same_view(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    )


def _aligned(*pointers: Any) -> bool:
    """Return True if all tensors among `pointers` begin at multiples of 16 bytes."""
    bits = 0
    for pointer in pointers:
        if isinstance(pointer, Tensor):
            bits |= pointer.data_ptr()
    return bits & 15 == 0


# ---------------------------------------------------------------------------------------------
# The launches of a call in their order, and the memory that they fill. New memory is aligned.
# ---------------------------------------------------------------------------------------------
def _tiles(
    shape: Geometry, call: Call, aligned: bool, scale: Tensor, keys: Tensor, part: int = 0
) -> list[Step]:
    """Raise `keys` to the best candidates of a part of the geometry, if it has any products."""
    launch = shape.tiles[part]
    if launch is None:
        return []
    sides = (call.reference, call.x) if shape.official else (call.x, call.reference)
    row, column = shape.templates if aligned else (None, None)
    if row is not None:
        row, column = with_tokens(row, sides[0]), with_tokens(column, sides[1])
    return [(launch, (aligned, *sides, row, column, scale, keys))]


def _match_by_slot(shape: Geometry, call: Call, aligned: bool) -> tuple[list[Step], Tensor, Tensor]:
    """Find the match of every slot: launches, similarity (B, C, N) fp32, index (B, C, N) int64."""
    x, reference = call.x, call.reference
    size = (shape.items, shape.slots, shape.N)
    similarity = x.new_empty(size, dtype=torch.float32)
    index = x.new_empty(size, dtype=torch.int64)
    if similarity.numel() == 0:
        return [], similarity, index
    keys = torch.empty_like(index)
    scale = searched = x.new_empty(shape.reference_scales, dtype=torch.float32)
    mask = _bytes(call.reference_mask)
    steps: list[Step] = [(shape.scale, (aligned, reference, mask, scale, keys))]
    if shape.official:
        searched = x.new_empty(shape.source_scales, dtype=torch.float32)
        steps.append((shape.source_scale, (aligned, x, None, searched, None)))
    steps += _tiles(shape, call, aligned, searched, keys)
    pointers = (x, reference, searched, scale, keys, similarity, index)
    steps.append((shape.resolve, (aligned, *pointers)))
    return steps, similarity, index


def _match_and_push(
    shape: Geometry, call: Call, numbers: tuple[Any, ...], out: Tensor
) -> tuple[list[Step], Tensor, Tensor]:
    """Match and push: launches, similarity (B, S, N) fp32 and what is pushed (B, S, N) int64."""
    x, reference, mask = call.x, call.reference, call.reference_mask
    source_mask = _bytes(call.source_mask)
    tokens_aligned = _aligned(x, None if reference is x else reference, mask)
    aligned = tokens_aligned and _aligned(*numbers, source_mask, out)
    size = shape.items, shape.result_slots, shape.N
    steps: list[Step] = []
    if shape.by_slot:
        steps, found, index = _match_by_slot(shape, call, tokens_aligned)
        similarity = found if shape.total else x.new_empty(size, dtype=torch.float32)
    else:
        similarity = x.new_empty(size, dtype=torch.float32)
    pushed = torch.empty_like(similarity, dtype=torch.int64)
    results = (*numbers, source_mask, out, similarity, pushed)
    if shape.N == 0:
        return [], similarity, pushed
    if shape.by_slot:
        steps.append((shape.from_matches, (aligned, x, reference, found, index, *results)))
        return steps, similarity, pushed
    keys = None if shape.by_fused else torch.empty_like(pushed)
    scale = x.new_empty(shape.reference_scales, dtype=torch.float32)
    steps.append((shape.scale, (tokens_aligned, reference, _bytes(mask), scale, keys)))
    if keys is None:
        steps.append((shape.fused, (aligned, x, reference, scale, *results)))
        return steps, similarity, pushed
    for part, push in enumerate(shape.push_from_keys):
        if shape.coarse:
            steps.append((triton_coarse.raise_keys, (call, scale, keys, shape.plan)))
        else:
            steps += _tiles(shape, call, tokens_aligned, scale, keys, part)
        steps.append((push, (aligned, x, reference, scale, keys, *results)))
    return steps, similarity, pushed


# ---------------------------------------------------------------------------------------------
# What the operator calls
# ---------------------------------------------------------------------------------------------
def match(call: Call) -> tuple[Tensor, Tensor]:
    """Find the best reference token of every source token, separately for each slot.

    Args:
        call: see `Call`; the tokens are fp32, bf16 or fp16.

    Returns:
        similarity (B, C, N) fp32 and index (B, C, N) int64; -inf and -1 where nothing matches.

    Raises:
        ValueError: another dtype. RuntimeError: Triton cannot run on the device of `x`.
    """
    x, reference = call.x, call.reference
    runtime.require(x)
    aligned = _aligned(x, None if reference is x else reference, call.reference_mask)
    with runtime.launch_device(x):
        steps, similarity, index = _match_by_slot(geometry(call), call, aligned)
        for launch, arguments in steps:
            launch(*arguments)
    return similarity, index


def guide(call: Call, out: Tensor) -> tuple[Tensor, Tensor]:
    """Match, threshold and push; the result is written to `out`.

    Args:
        call: see `Call`; the tokens are fp32, bf16 or fp16.
        out: (B, N, D), any strides, written completely; or `x` itself, where only the tokens that
            move are written.

    Returns:
        similarity (B, S, N) fp32, -inf where nothing matches; and pushed (B, S, N) int64, slot * M
        + token where a token was pushed, else -1. S is 1 for "nearest", else C.

    Raises:
        ValueError: another dtype. RuntimeError: Triton cannot run on the device of `x`.
    """
    x = call.x
    runtime.require(x)
    # With "first", the first items of the groups are never written, so there is no hazard. Other
    # references that are also outputs could be read by one program after another has moved them.
    hazard = call.pairing.mode != "first" and _overlap(out, call.reference)
    target = torch.empty_like(x) if hazard else out
    numbers, strides = _per_slot((call.alpha, call.threshold), x)
    push = Push(
        target.stride(),
        _same_view(target, x),
        isinstance(numbers[0], float),
        strides,
        None if call.source_mask is None else call.source_mask.stride(),
    )
    shape = geometry(call, push)
    with runtime.launch_device(x):
        steps, similarity, pushed = _match_and_push(shape, call, numbers, target)
        if len(shape.parts) == 1:
            for launch, arguments in steps:
                launch(*arguments)
        else:
            with SideStream(x) as side:
                for launch, arguments in steps:
                    with side.following() if launch in shape.push_from_keys else nullcontext():
                        launch(*arguments)
        if hazard:
            out.copy_(target)
    return similarity, pushed
