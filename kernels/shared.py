"""What the kernels share: pairing, norms, the product of two blocks of tokens, and the push.

    similarity(i, j) = <x_i, r_j> / (max(|x_i|, 1e-12) max(|r_j|, 1e-12))

A column scale is `1 / max(|r_j|, 1e-12)` or a negative number that says why token j is no
candidate. The source norm does not change the argmax, so matching scales columns only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import tuning
from .division import quotient

# Room for the scales of an item comes in blocks of this many.
SCALE_BLOCK = tl.constexpr(tuning.SCALE_BLOCK)
# What a scale says instead of 1 / norm, where a token must not be matched.
MASKED = tl.constexpr(-1.0)
NON_FINITE = tl.constexpr(-2.0)

# Sizes that change from call to call, and strides of what is read once: not even their value 1 or a
# factor 16 is compiled in.
RUNTIME_SIZES = [
    "N",
    "M",
    "slots",
    "first_product",
    "products",
    "first_item",
    "tile_code",
    "band_code",
    "tail_code",
    "product_code",
    "circle_code",
    "keys",
    "group_size",
    "reference_step",
    "stride_alpha",
    "stride_threshold",
    "stride_vb",
    "stride_vn",
]


# ---------------------------------------------------------------------------------------------
# Pairing, as negtome_fast/pairing.py defines it
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


@triton.jit
def slots_of(item, slots, group_size, MODE: tl.constexpr):
    """How many references `item` meets: none where it is the head of a group in mode "first"."""
    count = slots
    if MODE == "first":
        count = tl.where(item % group_size == 0, 0, slots)
    return count


@triton.jit
def product_items(
    product,
    slots,
    group_size,
    reference_step,
    product_code,
    circle_code,
    MODE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The two items of a product, the slot of the second for the first, and that of the first.

    Number `product` of the matrices of a launch. Without PAIRS the first item is the source, the
    second its reference, and the last number means nothing. With PAIRS both are items of a group.
    product_code divides by: the pairs of a group; group_size - 1 in mode "first"; else the slots.
    circle_code divides by group_size, with PAIRS only.
    """
    number = quotient(product, product_code)
    if PAIRS:
        # Positions on a circle: first all neighbours, then all at distance 2, and so on; where g is
        # even, the largest distance holds only g / 2 pairs, which come last.
        within = product - number * (group_size * (group_size - 1) // 2)
        distance = quotient(within, circle_code)
        first = within - distance * group_size
        second = first + distance + 1
        second -= tl.where(second >= group_size, group_size, 0)
        start = number * group_size
        result = (
            start + first,
            start + second,
            second - (second > first).to(tl.int32),
            first - (first > second).to(tl.int32),
        )
    elif MODE == "first":
        head = number * group_size
        result = head + product - number * (group_size - 1) + 1, head, 0 * number, 0 * number
    else:
        slot = product - number * slots
        other = reference_item(number, slot, group_size, reference_step, MODE)
        result = number, other, slot, slot
    return result


# ---------------------------------------------------------------------------------------------
# Norms, cosines, the one rounding
# ---------------------------------------------------------------------------------------------
@triton.jit
def inverse_norm(squares):
    """`1 / max(norm, 1e-12)` of sums of squares, NON_FINITE where the norm is not finite."""
    norm = tl.sqrt(squares)
    # A comparison with NaN is false: NaN and infinity both end up as NON_FINITE.
    return tl.where(norm < float("inf"), 1.0 / tl.maximum(norm, 1e-12), NON_FINITE)


@triton.jit
def scale_line(item, M):
    """Where the scales of `item`, a scalar or a tensor, begin: items have room for whole blocks."""
    return item.to(tl.int64) * (tl.cdiv(M, SCALE_BLOCK) * SCALE_BLOCK)


@triton.jit
def exact_cosine(
    pointers,
    stride_d,
    other_pointers,
    stride_od,
    other_scale,
    found,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """fp32 cosine of BLOCK_M pairs of tokens, recomputed from the tokens where `found`.

    other_scale (BLOCK_M,) is the other token's inverse norm. -inf where not found, and where the
    token's own norm is not finite.
    """
    squares = tl.zeros((BLOCK_M,), tl.float32)
    products = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, D, BLOCK_K):
        channels = start + tl.arange(0, BLOCK_K)
        inside = found[:, None] & (channels < D)[None, :]
        offsets = channels.to(tl.int64)
        token = tl.load(pointers[:, None] + (offsets * stride_d)[None, :], mask=inside, other=0.0)
        other = tl.load(
            other_pointers[:, None] + (offsets * stride_od)[None, :], mask=inside, other=0.0
        )
        token = token.to(tl.float32)
        squares += tl.sum(token * token, axis=1)
        products += tl.sum(token * other.to(tl.float32), axis=1)
    scale = inverse_norm(squares)
    return tl.where(found & (scale >= 0.0), products * scale * other_scale, float("-inf"))


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
# The product of a block of rows and a block of columns
# ---------------------------------------------------------------------------------------------
@triton.jit
def multiply(
    row_pointers,
    stride_rd,
    column_pointers,
    stride_cd,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """<row, column> for BLOCK_M rows and BLOCK_N columns of D channels, in fp32.

    Every pointer must be readable: callers let rows and columns past the end repeat the last one,
    which costs no mask in the loop.
    """
    ACCUMULATOR: tl.constexpr = tl.float64 if INTERPRETED else tl.float32
    product = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    for start in range(0, D, BLOCK_K):
        channels = start + tl.arange(0, BLOCK_K)
        inside = channels < D
        offsets = channels.to(tl.int64)
        rows = tl.load(
            row_pointers[:, None] + (offsets * stride_rd)[None, :], mask=inside[None, :], other=0.0
        )
        columns = tl.load(
            column_pointers[None, :] + (offsets * stride_cd)[:, None],
            mask=inside[:, None],
            other=0.0,
        )
        product = accumulate(product, rows, columns, INTERPRETED)
    return product.to(tl.float32)


@triton.jit
def accumulate(product, rows, columns, INTERPRETED: tl.constexpr):
    """`product + rows @ columns`, exact in the products of the operands."""
    if INTERPRETED:
        # The interpreter multiplies the raw bits of bf16 operands, and its BLAS rounds equal
        # columns differently by their place in the tile, which would break ties.
        rows = rows.to(tl.float64)
        columns = columns.to(tl.float64)
    # Without "ieee" fp32 operands would be rounded to TF32.
    return tl.dot(rows, columns, product, input_precision="ieee", out_dtype=product.dtype)


@triton.jit
def load_scales(scale_ptr, item, tokens, M):
    """Scales of tokens of one block, in [0, M) or just beyond; NaN where one is no candidate.

    A similarity with them is NaN, which `best_of` passes over: that costs nothing per similarity.
    """
    scale = tl.load(scale_ptr + scale_line(item, M) + tokens)
    return tl.where(scale >= 0.0, scale, float("nan"))


@triton.jit
def best_of(similarity, axis: tl.constexpr, INTERPRETED: tl.constexpr):
    """Maximum of a block (rows, columns) along `axis`, and the least position that has it.

    NaN is no candidate. It stands for a token that may not be matched, and comes from tokens that
    are not finite. A compiled maximum passes over NaN, and nothing equals it; the interpreter's
    maximum does not, so there it becomes -inf. Where nothing is a candidate the maximum is NaN or
    -inf, and the position means nothing.
    """
    if INTERPRETED:
        similarity = tl.where(similarity == similarity, similarity, float("-inf"))
    LENGTH: tl.constexpr = similarity.shape[axis]
    if axis == 0:
        best = tl.max(similarity, axis=0)
        row = tl.arange(0, LENGTH)[:, None]
        position = tl.min(tl.where(similarity == best[None, :], row, LENGTH), axis=0)
    else:
        # Runs of RUN columns: a thread holds columns at the same place in many runs, so the number
        # of the run is a constant of the register, which saves one register for each of them.
        RUN: tl.constexpr = 2048 // LENGTH if LENGTH > 32 else LENGTH
        RUNS: tl.constexpr = LENGTH // RUN
        runs = similarity.reshape(similarity.shape[0], RUNS, RUN)
        best = tl.max(tl.max(runs, axis=1), axis=1)
        number = tl.arange(0, RUNS)[None, :, None]
        run = tl.min(tl.where(runs == best[:, None, None], number, RUNS), axis=1)
        position = tl.min(run * RUN + tl.arange(0, RUN)[None, :], axis=1)
    return best, position


# ---------------------------------------------------------------------------------------------
# Numbers for each slot
# ---------------------------------------------------------------------------------------------
@triton.jit
def of_slot(value, slot, stride, NUMBERS: tl.constexpr):
    """`alpha` or `threshold` of a slot: behind a pointer, or with NUMBERS one number for all."""
    if NUMBERS:
        result = tl.cast(slot, tl.float32) * 0.0 + value
    else:
        result = tl.load(value + slot * stride)
    return result


# ---------------------------------------------------------------------------------------------
# Threshold and push of matches that a program has in registers
# ---------------------------------------------------------------------------------------------
@triton.jit
def push_match(
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
    slot,
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
    MODE: tl.constexpr,
    NUMBERS: tl.constexpr,
    INPLACE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Push BLOCK_M tokens of `item` away from reference token (slot, token), -1 where no match.

    slot, token (BLOCK_M,) int32. Writes similarity (B, 1, N) fp32, pushed (B, 1, N) int64 and out.
    """
    wide_item = item.to(tl.int64)
    wide_rows = rows.to(tl.int64)
    found = row_inside & (token >= 0)
    slot = tl.where(found, slot, 0)
    token = tl.where(found, token, 0).to(tl.int64)
    row_pointers = x_ptr + wide_item * stride_xb + wide_rows * stride_xn
    target = reference_item(item, slot, group_size, reference_step, MODE).to(tl.int64)
    target_pointers = reference_ptr + target * stride_rb + token * stride_rm

    # Threshold
    target_scale = tl.load(
        reference_scale_ptr + scale_line(target, M) + token, mask=found, other=0.0
    )
    similarity = exact_cosine(
        row_pointers,
        stride_xd,
        target_pointers,
        stride_rd,
        target_scale,
        found,
        D,
        BLOCK_M,
        BLOCK_K,
    )
    alpha = of_slot(alpha_ptr, slot, stride_alpha, NUMBERS)
    threshold = of_slot(threshold_ptr, slot, stride_threshold, NUMBERS)
    # -inf never exceeds a finite threshold, and thresholds that are not finite are refused.
    moved = found & (similarity > threshold)
    if source_mask_ptr is not None:
        source_mask = tl.load(
            source_mask_ptr + wide_item * stride_vb + wide_rows * stride_vn,
            mask=row_inside,
            other=0,
        )
        moved = moved & (source_mask != 0)
    output = wide_item * N + rows
    pushed = tl.where(moved, slot.to(tl.int64) * M + token, -1)
    tl.store(similarity_ptr + output, similarity, mask=row_inside)
    tl.store(pushed_ptr + output, pushed, mask=row_inside)

    # Push
    out_pointers = out_ptr + wide_item * stride_ob + wide_rows * stride_on
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
