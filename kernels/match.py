"""Best reference token of every source token, without ever storing the N x M similarities.

    j*(i) = argmax over allowed j of <x_i, r_j> / max(|r_j|, 1e-12)

The source norm does not change the argmax, so only columns are scaled inside the loop; the row is
scaled once at the end. `scale_kernel` prepares the columns, `match_kernel` returns similarity and
index, `fused_kernel` thresholds and pushes in the same launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a scale says instead of 1 / norm, where a token must not be matched.
MASKED = tl.constexpr(-1.0)
NON_FINITE = tl.constexpr(-2.0)

# Sizes that change from call to call, and strides of what is read once: not even their value 1 or a
# factor 16 is compiled in.
RUNTIME_SIZES = [
    "N",
    "M",
    "slots",
    "group_size",
    "reference_step",
    "stride_alpha",
    "stride_threshold",
    "stride_vb",
    "stride_vn",
]


# ---------------------------------------------------------------------------------------------
# Pairing, as kernels/pairing.py defines it
# ---------------------------------------------------------------------------------------------
@triton.jit
def source_item(program, group_size, MODE: tl.constexpr):
    """The source item that program number `program` owns: every item, or all but group heads."""
    item = program
    if MODE == "first":
        item = program // (group_size - 1) * group_size + program % (group_size - 1) + 1
    return item


@triton.jit
def reference_item(item, slot, group_size, reference_step, MODE: tl.constexpr):
    """The reference item that source `item` meets in `slot` (a scalar or a tensor)."""
    if MODE == "external":
        result = item * reference_step + slot
    elif MODE == "first":
        result = item - item % group_size + slot
    else:
        position = item % group_size
        result = item - position + slot + (slot >= position).to(tl.int32)
    return result


# ---------------------------------------------------------------------------------------------
# Inverse norms
# ---------------------------------------------------------------------------------------------
@triton.jit
def inverse_norm(
    row_pointers,
    row_inside,
    stride_d,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`1 / max(|row|, 1e-12)` in fp32 for BLOCK_M rows, NON_FINITE where the norm is not finite."""
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, D, BLOCK_K):
        channels = start + tl.arange(0, BLOCK_K)
        row = tl.load(
            row_pointers[:, None] + (channels.to(tl.int64) * stride_d)[None, :],
            mask=row_inside[:, None] & (channels < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        squares += tl.sum(row * row, axis=1)
    norm = tl.sqrt(squares)
    # A comparison with NaN is false: NaN and infinity both end up as NON_FINITE.
    return tl.where(norm < float("inf"), 1.0 / tl.maximum(norm, 1e-12), NON_FINITE)


@triton.jit(do_not_specialize=["M", "item_step", "stride_mb", "stride_mm"])
def scale_kernel(
    tokens_ptr,
    mask_ptr,
    scale_ptr,
    M,
    D,
    item_step,
    stride_tb,
    stride_tm,
    stride_td,
    stride_mb,
    stride_mm,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Column scales: tokens (P, M, D), mask (P, M) uint8 or None -> scale (P, M) fp32, contiguous.

    scale = 1 / max(|token|, 1e-12), or MASKED, or NON_FINITE. Program (i, p) owns BLOCK_M tokens
    of item `p * item_step`: with reference "first" only the heads of the groups are needed.
    """
    item = (tl.program_id(1) * item_step).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tokens < M
    pointers = tokens_ptr + item * stride_tb + tokens.to(tl.int64) * stride_tm
    scale = inverse_norm(pointers, inside, stride_td, D, BLOCK_M, BLOCK_K)
    if mask_ptr is not None:
        allowed = tl.load(
            mask_ptr + item * stride_mb + tokens.to(tl.int64) * stride_mm, mask=inside, other=0
        )
        scale = tl.where((allowed != 0) | (scale == NON_FINITE), scale, MASKED)
    tl.store(scale_ptr + item * M + tokens, scale, mask=inside)


# ---------------------------------------------------------------------------------------------
# The one rounding
# ---------------------------------------------------------------------------------------------
@triton.jit
def round_to(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Finite fp32 `value` in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter truncates to bf16, and carries wrongly where asked to round.
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


# ---------------------------------------------------------------------------------------------
# The walk over one reference item, shared by all kernels that match
# ---------------------------------------------------------------------------------------------
@triton.jit
def best_column(
    row_pointers,
    row_inside,
    stride_rd,
    column_ptr,
    stride_cm,
    stride_cd,
    scale_ptr,
    M,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Maximum and argmax over the M columns of one item, for BLOCK_M rows.

    row_pointers (BLOCK_M,); column_ptr and scale_ptr point at the item's first token and scale.
    Returns (BLOCK_M,) fp32, the maximum of <row, column> * scale, -inf where no column is allowed;
    and (BLOCK_M,) int32, the lowest column that reaches it, -1 where none is allowed.
    """
    ACCUMULATOR: tl.constexpr = tl.float64 if INTERPRETED else tl.float32
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    index = tl.full((BLOCK_M,), -1, tl.int32)
    for first in range(0, M, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        column_inside = columns < M
        column_pointers = column_ptr + columns.to(tl.int64) * stride_cm

        product = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
        for start in range(0, D, BLOCK_K):
            channels = start + tl.arange(0, BLOCK_K)
            channel_inside = channels < D
            offsets = channels.to(tl.int64)
            rows = tl.load(
                row_pointers[:, None] + (offsets * stride_rd)[None, :],
                mask=row_inside[:, None] & channel_inside[None, :],
                other=0.0,
            )
            cols = tl.load(
                column_pointers[None, :] + (offsets * stride_cd)[:, None],
                mask=column_inside[None, :] & channel_inside[:, None],
                other=0.0,
            )
            if INTERPRETED:
                # The interpreter multiplies the raw bits of bf16 operands, and its BLAS rounds
                # equal columns differently by their place in the tile, which would break ties.
                rows = rows.to(tl.float64)
                cols = cols.to(tl.float64)
            # Without "ieee" fp32 operands would be rounded to TF32.
            product = tl.dot(rows, cols, product, input_precision="ieee", out_dtype=ACCUMULATOR)

        # Padded, masked and non-finite columns carry a negative scale. NaN can then only come from
        # a row that is itself not finite; -inf keeps compiled and interpreted maxima alike.
        scale = tl.load(scale_ptr + columns, mask=column_inside, other=MASKED)
        similarity = product.to(tl.float32) * scale[None, :]
        usable = (scale >= 0.0)[None, :] & (similarity == similarity)
        similarity = tl.where(usable, similarity, float("-inf"))

        value, position = tl.max(similarity, axis=1, return_indices=True)
        # Strictly greater, as earlier tiles hold lower indices.
        better = value > best
        best = tl.where(better, value, best)
        index = tl.where(better, first + position, index)
    return best, index


# ---------------------------------------------------------------------------------------------
# Match alone
# ---------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def match_kernel(
    x_ptr,
    reference_ptr,
    x_scale_ptr,
    reference_scale_ptr,
    similarity_ptr,
    index_ptr,
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
    MODE: tl.constexpr,
    OFFICIAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Similarity and index per source item and slot; program (i, s, c) owns BLOCK_M tokens.

    x (B, N, D), reference (P, M, D), scales (B, N) and (P, M) fp32, contiguous ->
    similarity (B, C, N) fp32 and index (B, C, N) int64, contiguous; -inf and -1 where no match.

    paper:    rows are source tokens, columns reference tokens; x_scale_ptr is not read.
    official: rows are reference tokens, columns source tokens (N == M); the mask, folded into the
              reference scale, gates rows. A match that points at a non-finite r[i*] is none.
    """
    item = source_item(tl.program_id(1), group_size, MODE)
    slot = tl.program_id(2)
    other = reference_item(item, slot, group_size, reference_step, MODE).to(tl.int64)
    item = item.to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < N
    x_item = x_ptr + item * stride_xb
    reference_of_item = reference_ptr + other * stride_rb

    if OFFICIAL:
        row_scale = tl.load(reference_scale_ptr + other * M + rows, mask=row_inside, other=MASKED)
        source_scale = tl.load(x_scale_ptr + item * N + rows, mask=row_inside, other=NON_FINITE)
        row_scale = tl.where(source_scale >= 0.0, row_scale, NON_FINITE)
        best, index = best_column(
            reference_of_item + rows.to(tl.int64) * stride_rm,
            row_inside,
            stride_rd,
            x_item,
            stride_xn,
            stride_xd,
            x_scale_ptr + item * N,
            N,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            INTERPRETED,
        )
        target_scale = tl.load(
            reference_scale_ptr + other * M + index, mask=index >= 0, other=NON_FINITE
        )
        found = (index >= 0) & (row_scale >= 0.0) & (target_scale != NON_FINITE)
    else:
        row_pointers = x_item + rows.to(tl.int64) * stride_xn
        best, index = best_column(
            row_pointers,
            row_inside,
            stride_xd,
            reference_of_item,
            stride_rm,
            stride_rd,
            reference_scale_ptr + other * M,
            M,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            INTERPRETED,
        )
        row_scale = inverse_norm(row_pointers, row_inside, stride_xd, D, BLOCK_M, BLOCK_K)
        found = (index >= 0) & (row_scale >= 0.0)

    output = (item * slots + slot) * N + rows
    similarity = tl.where(found, best * row_scale, float("-inf"))
    tl.store(similarity_ptr + output, similarity, mask=row_inside)
    tl.store(index_ptr + output, tl.where(found, index, -1).to(tl.int64), mask=row_inside)


# ---------------------------------------------------------------------------------------------
# Match, threshold and push in one launch
# ---------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def fused_kernel(
    x_ptr,
    reference_ptr,
    reference_scale_ptr,
    alpha_ptr,
    threshold_ptr,
    movable_ptr,
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
    INPLACE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Paper matching, nearest of all slots; program (i, s) owns BLOCK_M tokens of one source item.

    y_i = x_i + alpha_c (x_i - r_cj) where cos(x_i, r_cj) > threshold_c, else y_i = x_i;
    (c, j) is the best match over all slots and tokens, lowest slot and then lowest token on ties.

    x, out (B, N, D), reference (P, M, D), any strides; reference_scale (P, M) from scale_kernel;
    alpha, threshold fp32 with stride 0 or 1 over the slots; movable (B, N) uint8 or None;
    similarity (B, 1, N) fp32 and pushed (B, 1, N) int64 = slot * M + token, -1 where not pushed.
    INPLACE writes only the rows that change.
    """
    # Which rows
    item = source_item(tl.program_id(1), group_size, MODE)
    wide_item = item.to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < N
    row_pointers = x_ptr + wide_item * stride_xb + rows.to(tl.int64) * stride_xn

    # Match
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    index = tl.full((BLOCK_M,), -1, tl.int32)
    best_slot = tl.zeros((BLOCK_M,), tl.int32)
    for slot in range(slots):
        other = reference_item(item, slot, group_size, reference_step, MODE).to(tl.int64)
        value, position = best_column(
            row_pointers,
            row_inside,
            stride_xd,
            reference_ptr + other * stride_rb,
            stride_rm,
            stride_rd,
            reference_scale_ptr + other * M,
            M,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            INTERPRETED,
        )
        better = value > best
        best = tl.where(better, value, best)
        index = tl.where(better, position, index)
        best_slot = tl.where(better, slot, best_slot)

    # Threshold
    row_scale = inverse_norm(row_pointers, row_inside, stride_xd, D, BLOCK_M, BLOCK_K)
    found = (index >= 0) & (row_scale >= 0.0)
    similarity = tl.where(found, best * row_scale, float("-inf"))
    alpha = tl.load(alpha_ptr + best_slot * stride_alpha)
    threshold = tl.load(threshold_ptr + best_slot * stride_threshold)
    moved = found & (similarity > threshold) & row_inside
    if movable_ptr is not None:
        movable = tl.load(
            movable_ptr + wide_item * stride_vb + rows.to(tl.int64) * stride_vn,
            mask=row_inside,
            other=0,
        )
        moved = moved & (movable != 0)
    output = wide_item * N + rows
    pushed = tl.where(moved, best_slot.to(tl.int64) * M + index, -1)
    tl.store(similarity_ptr + output, similarity, mask=row_inside)
    tl.store(pushed_ptr + output, pushed, mask=row_inside)

    # Push
    target = reference_item(item, best_slot, group_size, reference_step, MODE).to(tl.int64)
    target_pointers = reference_ptr + target * stride_rb + index.to(tl.int64) * stride_rm
    out_pointers = out_ptr + wide_item * stride_ob + rows.to(tl.int64) * stride_on
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
        matched = tl.load(
            target_pointers[:, None] + (offsets * stride_rd)[None, :],
            mask=moved[:, None] & channel_inside,
            other=0.0,
        ).to(tl.float32)
        exact = source.to(tl.float32)
        result = exact + alpha[:, None] * (exact - matched)
        tl.store(
            out_pointers[:, None] + (offsets * stride_od)[None, :],
            tl.where(moved[:, None], round_to(result, source.dtype, INTERPRETED), source),
            mask=written[:, None] & channel_inside,
        )
