"""The operator on Triton: allocates, chooses grids and configurations, launches kernels/.

Paper matching with combine="nearest" is column scales and then, as the tuning table says, either
one launch in which programs own rows, or tiles and a push. Everything else is scales, tiles,
similarities, push. Nothing here waits for the device or measures anything, and inputs are taken
with the strides that they have; so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import tuning
from ..kernels.pairing import Pairing
from . import triton_runtime as runtime
from .triton_descriptors import descriptor
from .triton_streams import SideStream


# ---------------------------------------------------------------------------------------------
# Arguments of launches
# ---------------------------------------------------------------------------------------------
def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _bytes(mask: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A boolean (rows, tokens) mask as bytes, without a copy, and its strides."""
    if mask is None:
        return None, 0, 0
    return mask.view(torch.uint8), mask.stride(0), mask.stride(1)


def _per_slot(values: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """`alpha` and `threshold` as a launch takes them, and their strides over the slots.

    Numbers that the host knows are arguments of the launch; others are read on the device.
    """
    if all(value.numel() == 1 and value.device.type == "cpu" for value in values):
        return tuple(map(float, values)), (0, 0)
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


class _Call:
    """What the launches of one call share: tensors, pairing, sizes, the plan."""

    def __init__(self, x: Tensor, reference: Tensor, pairing: Pairing, mask: Tensor | None) -> None:
        self.x, self.reference, self.pairing, self.mask = x, reference, pairing, mask
        self.items, self.N, self.D = x.shape
        self.M = reference.shape[1]
        self.mode, self.slots = pairing.mode, pairing.slots
        self.group_size, self.groups = pairing.group_size, pairing.groups
        # How many reference items further the next source item's first one is.
        self.reference_step = pairing.references if pairing.per_item else 0
        self.interpreted = runtime.interpreting()
        sources = self.items - self.groups if self.mode == "first" else self.items
        self.products = sources * self.slots
        arch = tuning.INTERPRETED if self.interpreted else runtime.architecture(x.device.index)
        dtype = runtime.DTYPES[x.dtype]
        self.plan = tuning.plan(arch, dtype, self.products, self.N, self.M, self.D)

    @property
    def sizes(self) -> tuple[int, ...]:
        """N, M, D, slots, group_size, reference_step, as most kernels take them."""
        return self.N, self.M, self.D, self.slots, self.group_size, self.reference_step

    def empty(self, slots: int, dtype: torch.dtype) -> Tensor:
        """New memory (B, slots, N)."""
        return self.x.new_empty((self.items, slots, self.N), dtype=dtype)

    # -----------------------------------------------------------------------------------------
    # Launches
    # -----------------------------------------------------------------------------------------
    def scales(self, keys: Tensor | None, official: bool = False) -> tuple[Tensor, Tensor]:
        """Column scales of the references and of what is searched; the launch empties `keys`.

        They are one tensor, but for official matching, which searches the source tokens.
        """
        step = self.group_size if self.mode == "first" else 1
        scale = self._scales(self.reference, self.mask, step, keys)
        return scale, self._scales(self.x, None, 1, None) if official else scale

    def _scales(
        self, tokens: Tensor, mask: Tensor | None, item_step: int, keys: Tensor | None
    ) -> Tensor:
        """Scales (P, M up to whole blocks) of tokens (P, M, D); of items 0, item_step, ... only."""
        from ..kernels.match import scale_kernel

        items, length, _ = tokens.shape
        config = self.plan.scale
        room = _blocks(length, tuning.SCALE_BLOCK) * tuning.SCALE_BLOCK
        scale = tokens.new_empty((items, room), dtype=torch.float32)
        mask, mask_item, mask_token = _bytes(mask)
        scale_kernel[(_blocks(room, config.BLOCK_M), _blocks(items, item_step))](
            tokens,
            mask,
            scale,
            keys,
            length,
            self.D,
            item_step,
            0 if keys is None else keys.numel(),
            *tokens.stride(),
            mask_item,
            mask_token,
            **config.meta("BLOCK_M", "BLOCK_K"),
        )
        return scale

    def tiles(
        self,
        scale: Tensor,
        keys: Tensor,
        official: bool = False,
        first_product: int = 0,
        products: int | None = None,
    ) -> None:
        """Raise `keys` (B, C, N), or (B, 1, N) for the best of all slots, to the best candidates.

        `products` from `first_product` on, all by default; in mode "others" a pair is one of them.
        """
        from ..kernels.division import reciprocal
        from ..kernels.match import tile_kernel

        pairs = self.mode == "others"
        config = self.plan.pairs if pairs else self.plan.tiles
        if products is None:
            products = self.products // 2 if pairs else self.products
        row_blocks = _blocks(self.N, config.BLOCK_M)
        column_blocks = _blocks(self.M, config.BLOCK_N)
        tasks = products * row_blocks * column_blocks
        if tasks == 0:
            return
        if pairs:
            divisor = self.products // (2 * self.groups)
        else:
            divisor = self.group_size - 1 if self.mode == "first" else self.slots
        rows, columns = (self.reference, self.x) if official else (self.x, self.reference)
        row_descriptor = column_descriptor = None
        if config.DESCRIPTORS:
            row_descriptor = descriptor(rows, config.BLOCK_M, config.BLOCK_K)
            column_descriptor = descriptor(columns, config.BLOCK_N, config.BLOCK_K)
            if row_descriptor is None or column_descriptor is None:
                row_descriptor = column_descriptor = None
        tile_kernel[(self._programs(config, tasks),)](
            rows,
            columns,
            row_descriptor,
            column_descriptor,
            scale,
            keys,
            self.N,
            self.M,
            self.D,
            self.slots,
            first_product,
            products,
            self.group_size,
            self.reference_step,
            reciprocal(row_blocks * column_blocks),
            reciprocal(config.GROUP * column_blocks),
            reciprocal(row_blocks % config.GROUP or 1),
            reciprocal(divisor),
            reciprocal(self.group_size),
            *rows.stride(),
            *columns.stride(),
            MODE=self.mode,
            OFFICIAL=official,
            PAIRS=pairs,
            UNION=keys.shape[1] != self.slots,
            INTERPRETED=self.interpreted,
            FLATTEN=bool(config.FLATTEN) and row_descriptor is not None,
            **config.meta("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP"),
            **({} if self.interpreted or torch.version.hip else config.cap()),
        )

    def _programs(self, config: tuning.Config, tasks: int) -> int:
        """How many programs share `tasks` tiles; few when interpreted, so that they do share."""
        multiprocessors = 3 if self.interpreted else runtime.multiprocessors(self.x.device.index)
        return min(tasks, multiprocessors * config.RESIDENT)

    def resolve(self, official: bool) -> tuple[Tensor, Tensor]:
        """Similarity (B, C, N) fp32 and index (B, C, N) int64 of every slot by itself."""
        from ..kernels.match import resolve_kernel

        similarity = self.empty(self.slots, torch.float32)
        index = self.empty(self.slots, torch.int64)
        if similarity.numel() == 0:
            return similarity, index
        keys = self.empty(self.slots, torch.int64)
        reference_scale, scale = self.scales(keys, official)
        self.tiles(scale, keys, official)
        config = self.plan.resolve
        resolve_kernel[(_blocks(self.N, config.BLOCK_M), self.items)](
            self.x,
            self.reference,
            scale,
            reference_scale,
            keys,
            similarity,
            index,
            *self.sizes,
            *self.x.stride(),
            *self.reference.stride(),
            MODE=self.mode,
            OFFICIAL=official,
            **config.meta("BLOCK_M", "BLOCK_K"),
        )
        return similarity, index


class _Push:
    """Where a call's pushed tokens go, how far, and what it reports."""

    def __init__(
        self,
        call: _Call,
        alpha: Tensor,
        threshold: Tensor,
        movable: Tensor | None,
        out: Tensor,
        similarity: Tensor,
    ) -> None:
        self.call, self.out, self.similarity = call, out, similarity
        self.pushed = torch.empty_like(similarity, dtype=torch.int64)
        self.numbers, number_strides = _per_slot((alpha, threshold), call.x)
        self.movable, movable_item, movable_token = _bytes(movable)
        self.strides = (
            *call.x.stride(),
            *call.reference.stride(),
            *out.stride(),
            *number_strides,
            movable_item,
            movable_token,
        )
        self.constants = {
            "MODE": call.mode,
            "NUMBERS": isinstance(self.numbers[0], float),
            "INPLACE": _same_view(out, call.x),
            "INTERPRETED": call.interpreted,
        }

    @property
    def pointers(self) -> tuple[Any, ...]:
        """alpha, threshold, movable, out, similarity, pushed: what all kernels that push take."""
        return *self.numbers, self.movable, self.out, self.similarity, self.pushed

    def by_rows(self) -> None:
        """Match and push in one launch, in which programs own rows."""
        from ..kernels.rows import rows_kernel

        call, config = self.call, self.call.plan.rows
        scale, _ = call.scales(None)
        rows_kernel[(_blocks(call.N, config.BLOCK_M), call.items)](
            call.x,
            call.reference,
            scale,
            *self.pointers,
            *call.sizes,
            *self.strides,
            **self.constants,
            **config.meta("BLOCK_M", "BLOCK_N", "BLOCK_K"),
        )

    def by_tiles(self) -> None:
        """Match by tiles, then push; item by item where the plan overlaps the two."""
        call = self.call
        keys = call.empty(1, torch.int64)
        scale, _ = call.scales(keys)
        if call.mode == "others" or not call.plan.tiles.OVERLAP or call.items == 1:
            call.tiles(scale, keys)
            self._finish(scale, keys, 0, call.items)
            return
        products = 0
        with SideStream(call.x) as side:
            for item in range(call.items):
                if call.mode != "first" or item % call.group_size:
                    call.tiles(scale, keys, first_product=products, products=call.slots)
                    products += call.slots
                side.follow(lambda item=item: self._finish(scale, keys, item, 1))

    def _finish(self, scale: Tensor, keys: Tensor, first_item: int, items: int) -> None:
        from ..kernels.push import finish_kernel

        call, config = self.call, self.call.plan.finish
        finish_kernel[(_blocks(call.N, config.BLOCK_M), items)](
            call.x,
            call.reference,
            scale,
            keys,
            *self.pointers,
            *call.sizes,
            first_item,
            *self.strides,
            **self.constants,
            **config.meta("BLOCK_M", "BLOCK_K"),
        )

    def from_matches(self, similarity: Tensor, index: Tensor, total: bool) -> None:
        """Push from what every slot found, its sum where `total`."""
        from ..kernels.push import push_kernel

        call, config = self.call, self.call.plan.push
        push_kernel[(_blocks(call.N, config.BLOCK_M), call.items)](
            call.x,
            call.reference,
            similarity,
            index,
            *self.pointers,
            *call.sizes,
            *self.strides,
            SUM=total,
            **self.constants,
            **config.meta("BLOCK_M", "BLOCK_K"),
        )


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
    with runtime.launch_device(x):
        return _Call(x, reference, pairing, reference_mask).resolve(matching == "official")


def guide(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    alpha: Tensor,
    threshold: Tensor,
    reference_mask: Tensor | None,
    movable: Tensor | None,
    matching: str,
    combine: str,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Match, threshold and push; the result is written to `out`.

    Args:
        x, reference, pairing, reference_mask, matching: as for `match`.
        alpha, threshold: fp32, shape () or (C,), on any device.
        movable: (B, N) bool or None, True where a source token may move.
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
    with runtime.launch_device(x):
        call = _Call(x, reference, pairing, reference_mask)
        # Group heads are never written, so "first" has no hazard; other references that are also
        # outputs would be read by one program after another has moved them.
        hazard = pairing.mode != "first" and _overlap(out, reference)
        target = torch.empty_like(x) if hazard else out
        official, total = matching == "official", combine == "sum"
        if official or total:
            found, index = call.resolve(official)
            similarity = found if total else call.empty(1, torch.float32)
            push = _Push(call, alpha, threshold, movable, target, similarity)
            if call.N:
                push.from_matches(found, index, total)
        else:
            similarity = call.empty(1, torch.float32)
            push = _Push(call, alpha, threshold, movable, target, similarity)
            # A key of the union of all slots has 31 bits for slot and token.
            if call.N == 0:
                pass
            elif call.plan.kind == "rows" or call.slots * call.M >= 2**31:
                push.by_rows()
            else:
                push.by_tiles()
        if hazard:
            out.copy_(target)
        return similarity, push.pushed
