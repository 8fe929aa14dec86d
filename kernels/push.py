"""Compare known matches with the threshold, and push.

    nearest: y_i = x_i + [s_c > threshold_c] alpha_c (x_i - r_c), c the slot of largest similarity
    sum:     y_i = x_i + sum over slots c of [s_c > threshold_c] alpha_c (x_i - r_c)

The extrapolation of NegToMe (arXiv 2412.01339). `push_from_keys_kernel` follows
`tiled_match_kernel`: paper matching, nearest. `push_kernel` follows `resolve_kernel`: official
matching, or combine="sum".
"""

from __future__ import annotations

import triton
import triton.language as tl

from .match import NO_KEY, unpack
from .shared import RUNTIME_SIZES, push_match, reference_item, round_to, slot_value


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
    """Push every source token away from the token of its key.

        y_i = x_i + alpha_c (x_i - r_cj) where cos(x_i, r_cj) > threshold_c, else y_i = x_i

    keys (B, 1, N) int64 over all slots, whose token is slot * M + token; all else as for
    fused_kernel. Program (i, b) owns BLOCK_M tokens of item `first_item` + b. The cosine that meets
    the threshold is recomputed in fp32 from the two tokens, so it does not depend on the tiles.
    """
    # Rows of this program, and their keys
    item = first_item + tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < N
    key = tl.load(key_ptr + item.to(tl.int64) * N + rows, mask=row_inside, other=NO_KEY)
    # Keys of group heads in mode "first" are empty: nothing offered them a candidate.
    match = unpack(key)

    # Threshold and push
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
    """Push every source token away from its nearest match, or with SUM from all its matches.

    x, out (B, N, D), reference (P, M, D), any strides; match_similarity (B, C, N) fp32 and
    match_index (B, C, N) int64, contiguous, -1 where there is no match; alpha, threshold fp32 with
    stride 0 or 1 over the slots, or numbers with NUMBERS; source_mask (B, N) uint8 or None. SUM:
    pushed (B, C, N), similarity_ptr is not written; else similarity (B, 1, N) fp32 and pushed
    (B, 1, N). pushed is int64, slot * M + token, -1 where not pushed. Program (i, b) owns BLOCK_M
    tokens of item b. INPLACE writes only the rows that change.
    """
    # Rows of this program, and those that may move
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

    # Threshold: slot by slot, keeping the best one, or with SUM all
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    index = tl.full((BLOCK_M,), -1, tl.int64)
    best_slot = tl.zeros((BLOCK_M,), tl.int32)
    changed = tl.zeros((BLOCK_M,), tl.int32)
    for slot in range(slots):
        match = (wide_item * slots + slot) * N + rows
        value = tl.load(match_similarity_ptr + match, mask=row_inside, other=float("-inf"))
        position = tl.load(match_index_ptr + match, mask=row_inside, other=-1)
        if SUM:
            threshold = slot_value(threshold_ptr, slot, stride_threshold, NUMBERS)
            slot_moved = may_move & (position >= 0) & (value > threshold)
            pushed = tl.where(slot_moved, tl.cast(slot, tl.int64) * M + position, -1)
            tl.store(pushed_ptr + match, pushed, mask=row_inside)
            changed = changed | slot_moved.to(tl.int32)
        else:
            better = value > best
            best = tl.where(better, value, best)
            index = tl.where(better, position, index)
            best_slot = tl.where(better, slot, best_slot)
    alpha = slot_value(alpha_ptr, best_slot, stride_alpha, NUMBERS)
    target = reference_item(item, best_slot, group_size, reference_step, MODE).to(tl.int64)
    target_pointers = reference_ptr + target * stride_rb + index * stride_rm
    if SUM:
        moved = changed != 0
    else:
        threshold = slot_value(threshold_ptr, best_slot, stride_threshold, NUMBERS)
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
                slot_alpha = slot_value(alpha_ptr, slot, stride_alpha, NUMBERS)
                slot_threshold = slot_value(threshold_ptr, slot, stride_threshold, NUMBERS)
                slot_moved = may_move & (position >= 0) & (value > slot_threshold)
                other = reference_item(item, slot, group_size, reference_step, MODE).to(tl.int64)
                slot_pointers = reference_ptr + other * stride_rb + position * stride_rm
                matched = tl.load(
                    slot_pointers[:, None] + (offsets * stride_rd)[None, :],
                    mask=slot_moved[:, None] & channel_inside,
                    other=0.0,
                ).to(tl.float32)
                away = tl.where(slot_moved[:, None], exact - matched, 0.0)
                # Each sum saturates, so that no infinity meets another of the other sign.
                result = round_to(result + slot_alpha * away, tl.float32, INTERPRETED)
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
