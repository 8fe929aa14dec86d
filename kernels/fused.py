"""Match, compare with the threshold and push in one launch.

    y_i = x_i + alpha_c (x_i - r_cj) where cos(x_i, r_cj) > threshold_c, else y_i = x_i;
    (c, j) is the best match over all slots and tokens, lowest slot and then lowest token on ties.

Paper matching of NegToMe (arXiv 2412.01339), combine="nearest". A program owns BLOCK_M source
tokens and walks all reference tokens: nothing is written between matching and push, but few source
tokens leave a GPU idle. The tuning table says where that is faster than tiles (match.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import (
    RUNTIME_SIZES,
    best_of,
    load_scales,
    multiply,
    push_match,
    reference_item,
    slots_of,
)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def fused_kernel(
    x_ptr,
    reference_ptr,
    reference_scale_ptr,
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
    INPLACE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Push every source token away from its best match of all slots.

    x, out (B, N, D), reference (P, M, D), any strides; reference_scale (P, M) from scale_kernel;
    alpha, threshold fp32 with stride 0 or 1 over the slots, or numbers with NUMBERS; source_mask
    (B, N) uint8 or None; similarity (B, 1, N) fp32 and pushed (B, 1, N) int64 = slot * M + token,
    -1 where not pushed. Program (i, b) owns BLOCK_M tokens of item b. INPLACE writes only the rows
    that change.
    """
    # Rows of this program
    item = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_pointers = x_ptr + item.to(tl.int64) * stride_xb
    row_pointers += tl.minimum(rows, N - 1).to(tl.int64) * stride_xn

    # Match: ties keep the earlier slot and tile, which hold the lower indices
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    token = tl.full((BLOCK_M,), -1, tl.int32)
    best_slot = tl.zeros((BLOCK_M,), tl.int32)
    for slot in range(slots_of(item, slots, group_size, MODE)):
        other = reference_item(item, slot, group_size, reference_step, MODE).to(tl.int64)
        for first in range(0, M, BLOCK_N):
            columns = first + tl.arange(0, BLOCK_N)
            similarities = multiply(
                row_pointers,
                stride_xd,
                reference_ptr
                + other * stride_rb
                + tl.minimum(columns, M - 1).to(tl.int64) * stride_rm,
                stride_rd,
                D,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                INTERPRETED,
            )
            scale = load_scales(reference_scale_ptr, other, columns, M)
            value, position = best_of(similarities * scale[None, :], 1, INTERPRETED)
            better = value > best
            best = tl.where(better, value, best)
            token = tl.where(better, first + position, token)
            best_slot = tl.where(better, slot, best_slot)

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
        rows < N,
        best_slot,
        token,
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
