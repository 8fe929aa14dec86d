"""Threshold and extrapolate, from matches that are already known.

    nearest: y_i = x_i + [s_c > threshold_c] alpha_c (x_i - r_c), c the slot of largest similarity
    sum:     y_i = x_i + sum over slots c of [s_c > threshold_c] alpha_c (x_i - r_c)

`push_from_keys_kernel` ends the matching of tiled_match_kernel: nearest, paper matching.
`push_kernel` takes similarities and indices, for official matching and combine="sum".
"""

from __future__ import annotations

import triton
import triton.language as tl

from .match import NO_KEY, unpack
from .shared import RUNTIME_SIZES, of_slot, push_match, reference_item, round_to


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def push_from_keys_kernel(
    x_ptr,
    reference_ptr,
    reference_scale_ptr,
    key_ptr,
    alpha_ptr,
    threshold_ptr,
    source_mask_ptr,
    out_ptr,
    similarity_ptr,
    pushed_ptr,
    N,
    M,
    D,
    slots,
    group_size,
    reference_step,
    first_item,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_rb,
    stride_rm,
    stride_rd,
    stride_ob,
    stride_on,
    stride_od,
    stride_alpha,
    stride_threshold,
    stride_vb,
    stride_vn,
    MODE: tl.constexpr,
    NUMBERS: tl.constexpr,
    INPLACE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Push from keys (B, 1, N) of the union of all slots.

    Program (i, b) owns BLOCK_M tokens of item `first_item` + b. Arguments as for fused_kernel. The
    cosine that meets the threshold is recomputed in fp32 from the two tokens, so that it does not
    depend on the tiles.
    """
    item = first_item + tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < N
    key = tl.load(key_ptr + item.to(tl.int64) * N + rows, mask=row_inside, other=NO_KEY)
    # Group heads of mode "first" were offered no candidate: their keys say so.
    match = unpack(key)
    push_match(
        x_ptr,
        reference_ptr,
        reference_scale_ptr,
        alpha_ptr,
        threshold_ptr,
        source_mask_ptr,
        out_ptr,
        similarity_ptr,
        pushed_ptr,
        item,
        rows,
        row_inside,
        match // M,
        tl.where(match >= 0, match % M, -1),
        N,
        M,
        D,
        group_size,
        reference_step,
        stride_xb,
        stride_xn,
        stride_xd,
        stride_rb,
        stride_rm,
        stride_rd,
        stride_ob,
        stride_on,
        stride_od,
        stride_alpha,
        stride_threshold,
        stride_vb,
        stride_vn,
        MODE,
        NUMBERS,
        INPLACE,
        INTERPRETED,
        BLOCK_M,
        BLOCK_K,
    )


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def push_kernel(
    x_ptr,
    reference_ptr,
    match_similarity_ptr,
    match_index_ptr,
    alpha_ptr,
    threshold_ptr,
    source_mask_ptr,
    out_ptr,
    similarity_ptr,
    pushed_ptr,
    N,
    M,
    D,
    slots,
    group_size,
    reference_step,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_rb,
    stride_rm,
    stride_rd,
    stride_ob,
    stride_on,
    stride_od,
    stride_alpha,
    stride_threshold,
    stride_vb,
    stride_vn,
    MODE: tl.constexpr,
    NUMBERS: tl.constexpr,
    SUM: tl.constexpr,
    INPLACE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (i, b) owns BLOCK_M tokens of item b.

    x, out (B, N, D), reference (P, M, D), any strides; match_similarity (B, C, N) fp32 and
    match_index (B, C, N) int64, contiguous, -1 where no match; alpha, threshold fp32 with stride
    0 or 1 over the slots, or numbers with NUMBERS; source_mask (B, N) uint8 or None. SUM: pushed
    (B, C, N), similarity_ptr is not written; nearest: similarity (B, 1, N) fp32, pushed (B, 1, N).
    pushed is int64, slot * M + token, -1 where not pushed. INPLACE writes only the rows that
    change.
    """
    # Which rows
    item = tl.program_id(1)
    wide_item = item.to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < N
    row_pointers = x_ptr + wide_item * stride_xb + rows.to(tl.int64) * stride_xn
    out_pointers = out_ptr + wide_item * stride_ob + rows.to(tl.int64) * stride_on
    may_move = row_inside
    if source_mask_ptr is not None:
        source_mask = tl.load(
            source_mask_ptr + wide_item * stride_vb + rows.to(tl.int64) * stride_vn,
            mask=row_inside,
            other=0,
        )
        may_move = may_move & (source_mask != 0)

    # Threshold; a slot at a time, keeping the best one or all
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    index = tl.full((BLOCK_M,), -1, tl.int64)
    best_slot = tl.zeros((BLOCK_M,), tl.int32)
    changed = tl.zeros((BLOCK_M,), tl.int32)
    for slot in range(slots):
        match = (wide_item * slots + slot) * N + rows
        value = tl.load(match_similarity_ptr + match, mask=row_inside, other=float("-inf"))
        position = tl.load(match_index_ptr + match, mask=row_inside, other=-1)
        if SUM:
            threshold = of_slot(threshold_ptr, slot, stride_threshold, NUMBERS)
            slot_moved = may_move & (position >= 0) & (value > threshold)
            pushed = tl.where(slot_moved, tl.cast(slot, tl.int64) * M + position, -1)
            tl.store(pushed_ptr + match, pushed, mask=row_inside)
            changed = changed | slot_moved.to(tl.int32)
        else:
            better = value > best
            best = tl.where(better, value, best)
            index = tl.where(better, position, index)
            best_slot = tl.where(better, slot, best_slot)
    alpha = of_slot(alpha_ptr, best_slot, stride_alpha, NUMBERS)
    target = reference_item(item, best_slot, group_size, reference_step, MODE).to(tl.int64)
    target_pointers = reference_ptr + target * stride_rb + index * stride_rm
    if SUM:
        moved = changed != 0
    else:
        threshold = of_slot(threshold_ptr, best_slot, stride_threshold, NUMBERS)
        moved = may_move & (index >= 0) & (best > threshold)
        output = wide_item * N + rows
        tl.store(similarity_ptr + output, best, mask=row_inside)
        pushed = tl.where(moved, best_slot.to(tl.int64) * M + index, -1)
        tl.store(pushed_ptr + output, pushed, mask=row_inside)

    # Push
    written = row_inside
    if INPLACE:
        written = moved
    for start in range(0, D, BLOCK_K):
        channels = start + tl.arange(0, BLOCK_K)
        channel_inside = (channels < D)[None, :]
        offsets = channels.to(tl.int64)
        source = tl.load(
            row_pointers[:, None] + (offsets * stride_xd)[None, :],
            mask=written[:, None] & channel_inside,
            other=0.0,
        )
        exact = source.to(tl.float32)
        result = exact
        if SUM:
            for slot in range(slots):
                match = (wide_item * slots + slot) * N + rows
                value = tl.load(match_similarity_ptr + match, mask=row_inside, other=float("-inf"))
                position = tl.load(match_index_ptr + match, mask=row_inside, other=-1)
                slot_alpha = of_slot(alpha_ptr, slot, stride_alpha, NUMBERS)
                slot_threshold = of_slot(threshold_ptr, slot, stride_threshold, NUMBERS)
                slot_moved = may_move & (position >= 0) & (value > slot_threshold)
                other = reference_item(item, slot, group_size, reference_step, MODE).to(tl.int64)
                slot_pointers = reference_ptr + other * stride_rb + position * stride_rm
                matched = tl.load(
                    slot_pointers[:, None] + (offsets * stride_rd)[None, :],
                    mask=slot_moved[:, None] & channel_inside,
                    other=0.0,
                ).to(tl.float32)
                away = tl.where(slot_moved[:, None], exact - matched, 0.0)
                result += slot_alpha * away
        else:
            matched = tl.load(
                target_pointers[:, None] + (offsets * stride_rd)[None, :],
                mask=moved[:, None] & channel_inside,
                other=0.0,
            ).to(tl.float32)
            result = exact + alpha[:, None] * (exact - matched)
        tl.store(
            out_pointers[:, None] + (offsets * stride_od)[None, :],
            tl.where(moved[:, None], round_to(result, source.dtype, INTERPRETED), source),
            mask=written[:, None] & channel_inside,
        )
