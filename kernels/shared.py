"""Parts that several kernels call: pairing, norms, products of blocks of tokens, the push.

    similarity(i, j) = <x_i, r_j> / (max(|x_i|, 1e-12) max(|r_j|, 1e-12))

The scale of token j is `1 / max(|r_j|, 1e-12)`, or a negative number that says why the token is no
candidate. Matching scales columns only: the source norm does not change the argmax.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import tuning
from .division import quotient

# The scales of an item fill whole blocks of this many.
SCALE_BLOCK = tl.constexpr(tuning.SCALE_BLOCK)
# Scales of tokens that must not be matched.
MASKED = tl.constexpr(-1.0)
NON_FINITE = tl.constexpr(-2.0)

# The largest finite numbers of the dtypes.
LARGEST_FP16 = tl.constexpr(65504.0)
LARGEST_BF16 = tl.constexpr((2 - 2**-7) * 2.0**127)
LARGEST_FP32 = tl.constexpr((2 - 2**-23) * 2.0**127)

# Sizes that change from call to call, and strides of arrays that are read once. Triton compiles a
# value of 1 and a factor of 16 into a kernel: not for these.
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
# Pairing: the rules of negtome_fast/pairing.py
# ---------------------------------------------------------------------------------------------
@triton.jit
def source_item(program, group_size, MODE: tl.constexpr):
    """Source item of program number `program`; in mode "first" group heads have no program."""
    item = program
    if MODE == "first":
        item = program // (group_size - 1) * group_size + program % (group_size - 1) + 1
    return item


@triton.jit
def reference_item(item, slot, group_size, reference_step, MODE: tl.constexpr):
    """Reference item that source `item` meets in `slot`, a scalar or a tensor."""
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
    """Number of references that `item` meets: none for a group head in mode "first"."""
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
    """Items of matrix number `product`: (first, second, slot of second, slot of first).

    Without PAIRS the first item is the source and the second its reference; the slot of the first
    means nothing. With PAIRS both are items of one group, and each is a reference of the other.
    product_code divides by the matrices of a group: its pairs with PAIRS, group_size - 1 in mode
    "first"; else by the slots. circle_code divides by group_size, with PAIRS only.
    """
    number = quotient(product, product_code)
    if PAIRS:
        # The items of a group stand on a circle. All pairs of neighbours come first, then all at
        # distance 2, and so on. If group_size is even, the largest distance has half as many pairs.
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
    """`1 / max(norm, 1e-12)` from sums of squares; NON_FINITE where the norm is not finite."""
    norm = tl.sqrt(squares)
    # A comparison with NaN is false, so NaN becomes NON_FINITE as infinity does.
    return tl.where(norm < float("inf"), 1.0 / tl.maximum(norm, 1e-12), NON_FINITE)


@triton.jit
def scale_line(item, M):
    """Offset of the first scale of `item`, a scalar or a tensor; items fill whole blocks."""
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
    """fp32 cosines (BLOCK_M,) of pairs of tokens, computed from the tokens.

    other_scale (BLOCK_M,) are the inverse norms of the other tokens; those of the tokens are
    computed here. The result is -inf where not `found` and where the token is not finite.
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
    """fp32 `value`, not NaN, rounded to `dtype`, to nearest even; beyond its range, its largest."""
    if dtype == tl.float16:
        value = tl.clamp(value, -LARGEST_FP16, LARGEST_FP16)
    elif dtype == tl.bfloat16:
        value = tl.clamp(value, -LARGEST_BF16, LARGEST_BF16)
    else:
        value = tl.clamp(value, -LARGEST_FP32, LARGEST_FP32)
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter truncates to bf16, and its own rounding carries wrongly.
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


# ---------------------------------------------------------------------------------------------
# Product of a block of rows and a block of columns, and its maxima
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
    """Inner products (BLOCK_M, BLOCK_N) fp32 of rows and columns of D channels.

    All pointers must be readable. Callers repeat the last row or column past the end, so that the
    loop needs no mask for them.
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
    """`product + rows @ columns`; the products of operands are exact."""
    if INTERPRETED:
        # The interpreter multiplies the raw bits of bf16 operands. Its BLAS rounds equal columns
        # differently by their place in the tile, which would break ties. fp64 avoids both.
        rows = rows.to(tl.float64)
        columns = columns.to(tl.float64)
    # "ieee": fp32 operands are not rounded to TF32.
    return tl.dot(rows, columns, product, input_precision="ieee", out_dtype=product.dtype)


@triton.jit
def load_scales(scale_ptr, item, tokens, M):
    """Scales of a block of tokens, in [0, M) or just beyond; NaN for those that are no candidates.

    NaN makes its similarities NaN, and `best_of` passes over NaN: no similarity needs a mask.
    """
    scale = tl.load(scale_ptr + scale_line(item, M) + tokens)
    return tl.where(scale >= 0.0, scale, float("nan"))


@triton.jit
def best_of(similarity, axis: tl.constexpr, INTERPRETED: tl.constexpr):
    """Maximum of a block (rows, columns) along `axis`, and the least position that has it.

    NaN is no candidate: it marks tokens that may not be matched or are not finite. The compiled
    maximum passes over NaN; the interpreter's does not, so there NaN becomes -inf first. A line
    without a candidate has the maximum NaN or -inf and a meaningless position.
    """
    if INTERPRETED:
        similarity = tl.where(similarity == similarity, similarity, float("-inf"))
    LENGTH: tl.constexpr = similarity.shape[axis]
    if axis == 0:
        best = tl.max(similarity, axis=0)
        row = tl.arange(0, LENGTH)[:, None]
        position = tl.min(tl.where(similarity == best[None, :], row, LENGTH), axis=0)
    else:
        # Columns are cut into runs of RUN. A thread holds columns at one place of many runs, so the
        # number of the run is a constant of the register: that saves one register a column.
        RUN: tl.constexpr = 2048 // LENGTH if LENGTH > 32 else LENGTH
        RUNS: tl.constexpr = LENGTH // RUN
        runs = similarity.reshape(similarity.shape[0], RUNS, RUN)
        best = tl.max(tl.max(runs, axis=1), axis=1)
        number = tl.arange(0, RUNS)[None, :, None]
        run = tl.min(tl.where(runs == best[:, None, None], number, RUNS), axis=1)
        position = tl.min(run * RUN + tl.arange(0, RUN)[None, :], axis=1)
    return best, position


# ---------------------------------------------------------------------------------------------
# Alpha and threshold
# ---------------------------------------------------------------------------------------------
@triton.jit
def slot_value(value, slot, stride, NUMBERS: tl.constexpr):
    """`alpha` or `threshold` of a slot: read from memory, or with NUMBERS the number itself."""
    if NUMBERS:
        result = tl.cast(slot, tl.float32) * 0.0 + value
    else:
        result = tl.load(value + slot * stride)
    return result


# ---------------------------------------------------------------------------------------------
# Threshold and push, from matches in registers
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
    """Push BLOCK_M tokens of `item` away from their matches.

        y_i = x_i + alpha (x_i - r_j) where cos(x_i, r_j) > threshold, else y_i = x_i

    slot, token (BLOCK_M,) int32: the match, token -1 where there is none. Writes similarity
    (B, 1, N) fp32, pushed (B, 1, N) int64 and out; other arguments as for fused_kernel.
    """
    # Matched tokens
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
    alpha = slot_value(alpha_ptr, slot, stride_alpha, NUMBERS)
    threshold = slot_value(threshold_ptr, slot, stride_threshold, NUMBERS)
    # -inf exceeds no threshold: thresholds are finite, others are refused.
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
