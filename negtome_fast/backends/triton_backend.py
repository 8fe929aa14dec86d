"""The operator on Triton: allocates, chooses grids and configurations, launches kernels/.

Paper matching with combine="nearest" is column scales and then, as the tuning table says, either
one launch in which programs own rows, or tiles and a push. Everything else is scales, tiles,
similarities, push. Nothing here waits for the device or measures anything, and inputs are taken
with the strides that they have; so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..pairing import Pairing
from . import triton_runtime as runtime
from .triton_descriptors import with_tokens
from .triton_geometry import Geometry, Push, geometry
from .triton_streams import SideStream


# ---------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------
def _bytes(mask: Tensor | None) -> Tensor | None:
    """A boolean mask as bytes, without a copy."""
    return None if mask is None else mask.view(torch.uint8)


def _per_slot(values: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """`alpha` and `threshold` as a launch takes them, and their strides over the slots.

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
    """Whether all tensors among `pointers` begin at multiples of 16 bytes."""
    bits = 0
    for pointer in pointers:
        if isinstance(pointer, Tensor):
            bits |= pointer.data_ptr()
    return bits & 15 == 0


# ---------------------------------------------------------------------------------------------
# Launches in their order; new memory is always aligned
# ---------------------------------------------------------------------------------------------
class _Matching:
    """The tensors of one call that matching reads, and its launches."""

    def __init__(self, shape: Geometry, x: Tensor, reference: Tensor, mask: Tensor | None) -> None:
        self.shape, self.x, self.reference, self.mask = shape, x, reference, _bytes(mask)
        self.aligned = _aligned(x, None if reference is x else reference, mask)

    def scales(self, keys: Tensor | None) -> Tensor:
        """Column scales of the references; `keys` are emptied."""
        scale = self.x.new_empty(self.shape.reference_scales, dtype=torch.float32)
        self.shape.scale(self.aligned, self.reference, self.mask, scale, keys)
        return scale

    def tiles(self, scale: Tensor, keys: Tensor, part: int = 0) -> None:
        """Raise `keys` to the best candidates of the geometry's `part`."""
        shape = self.shape
        launch = shape.tiles[part]
        if launch is None:
            return
        sides = (self.reference, self.x) if shape.official else (self.x, self.reference)
        row, column = shape.templates if self.aligned else (None, None)
        if row is not None:
            row, column = with_tokens(row, sides[0]), with_tokens(column, sides[1])
        launch(self.aligned, *sides, row, column, scale, keys)

    def by_slot(self) -> tuple[Tensor, Tensor]:
        """Similarity (B, C, N) fp32 and index (B, C, N) int64 of every slot by itself."""
        shape, size = self.shape, (self.shape.items, self.shape.slots, self.shape.N)
        similarity = self.x.new_empty(size, dtype=torch.float32)
        index = self.x.new_empty(size, dtype=torch.int64)
        if similarity.numel() == 0:
            return similarity, index
        keys = torch.empty_like(index)
        scale = searched = self.scales(keys)
        if shape.official:
            searched = self.x.new_empty(shape.source_scales, dtype=torch.float32)
            shape.source_scale(self.aligned, self.x, None, searched, None)
        self.tiles(searched, keys)
        pointers = (self.x, self.reference, searched, scale, keys, similarity, index)
        shape.resolve(self.aligned, *pointers)
        return similarity, index


def _push(
    match: _Matching, numbers: tuple[Any, ...], source_mask: Any, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Match and push; similarity (B, S, N) fp32 and what was pushed, int64."""
    shape, x, reference = match.shape, match.x, match.reference
    source_mask = _bytes(source_mask)
    size = shape.items, shape.result_slots, shape.N
    aligned = match.aligned and _aligned(*numbers, source_mask, out)
    if shape.by_slot:
        found, index = match.by_slot()
        similarity = found if shape.total else x.new_empty(size, dtype=torch.float32)
    else:
        similarity = x.new_empty(size, dtype=torch.float32)
    pushed = torch.empty_like(similarity, dtype=torch.int64)
    results = (*numbers, source_mask, out, similarity, pushed)
    if shape.N == 0:
        pass
    elif shape.by_slot:
        shape.from_matches(aligned, x, reference, found, index, *results)
    elif shape.by_rows:
        shape.rows(aligned, x, reference, match.scales(None), *results)
    else:
        keys = torch.empty_like(pushed)
        scale = match.scales(keys)
        pointers = (x, reference, scale, keys, *results)
        if len(shape.finish) == 1:
            if shape.coarse:
                from .triton_coarse import raise_keys

                raise_keys(x, reference, shape.pairing, scale, keys, shape.plan)
            else:
                match.tiles(scale, keys)
            shape.finish[0](aligned, *pointers)
        else:
            with SideStream(x) as side:
                for part, finish in enumerate(shape.finish):
                    match.tiles(scale, keys, part)
                    side.follow(partial(finish, aligned, *pointers))
    return similarity, pushed


# ---------------------------------------------------------------------------------------------
# What the operator calls
# ---------------------------------------------------------------------------------------------
def match(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    reference_mask: Tensor | None,
    matching: str,
) -> tuple[Tensor, Tensor]:
    """Best reference token per source token and slot.

    Args:
        x: (B, N, D) fp32, bf16 or fp16, any strides.
        reference: (P, M, D), any strides; `x` itself unless `pairing.mode` is `"external"`.
        pairing: which source item meets which reference item, in C slots.
        reference_mask: (P, M) bool or None, True where a token may be matched.
        matching: `"paper"` or `"official"`.

    Returns:
        similarity (B, C, N) fp32 and index (B, C, N) int64; -inf and -1 where there is no match.

    Raises:
        ValueError: another dtype. RuntimeError: Triton cannot run on the device of `x`.
    """
    runtime.require(x)
    shape = geometry(x, reference, pairing, reference_mask, matching == "official")
    with runtime.launch_device(x):
        return _Matching(shape, x, reference, reference_mask).by_slot()


def guide(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    alpha: Tensor,
    threshold: Tensor,
    reference_mask: Tensor | None,
    source_mask: Tensor | None,
    matching: str,
    combine: str,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Match, threshold and push; the result is written to `out`.

    Args:
        x, reference, pairing, reference_mask, matching: as for `match`.
        alpha, threshold: fp32, shape () or (C,), on any device.
        source_mask: (B, N) bool or None, True where a source token may move.
        combine: `"nearest"` (S = 1) or `"sum"` (S = C).
        out: (B, N, D), any strides, written completely; or `x` for in-place, where only tokens
            that move are written.

    Returns:
        similarity (B, S, N) fp32, -inf where there is no match; and pushed (B, S, N) int64,
        slot * M + token where a token was pushed, else -1.

    Raises:
        ValueError: another dtype. RuntimeError: Triton cannot run on the device of `x`.
    """
    runtime.require(x)
    # Group heads are never written, so "first" has no hazard; other references that are also
    # outputs would be read by one program after another has moved them.
    hazard = pairing.mode != "first" and _overlap(out, reference)
    target = torch.empty_like(x) if hazard else out
    numbers, strides = _per_slot((alpha, threshold), x)
    push = Push(
        target.stride(),
        _same_view(target, x),
        isinstance(numbers[0], float),
        strides,
        None if source_mask is None else source_mask.stride(),
    )
    official, total = matching == "official", combine == "sum"
    shape = geometry(x, reference, pairing, reference_mask, official, total, push)
    with runtime.launch_device(x):
        match = _Matching(shape, x, reference, reference_mask)
        results = _push(match, numbers, source_mask, target)
        if hazard:
            out.copy_(target)
    return results
