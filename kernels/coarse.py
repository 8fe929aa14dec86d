"""Find which blocks of columns can hold a row's best match, by int8 products with proven bounds.

Around a centre c, scaled tokens are a = c + s p + e and b = c + t q + f, where p and q are integers
of at most 127, and e and f are what rounding to them leaves. For the columns b of a row a,

    a . b = a . c + s t (p . q) + c . (b - c) + R,    |R| <= |e| |t q| + |a - c| |f|

where a . c is the same for all columns. For every row `bound_kernel` keeps the largest upper bound
of a . b - a . c in each block of columns, and the largest lower bound over all blocks. No block
whose upper bound is below the row's lower bound holds the best column. coarse_scores.py scores the
other blocks exactly. If the bounds tell nothing apart, it scores all blocks: slow, and as exact.

The bounds hold on a GPU, for D < 2^15. With u = 2^-24, half a unit in the last place of fp32:

- a = s_i x and b = s_j r, with the fp32 scales exactly as stored. Errors of norms do not matter:
  the exact kernel compares s_j <x, r>, whose order over j is that of a . b. A norm, an approximate
  root and a division are right to D u / 2 + 8 u, so |a|, |b| and |c| are less than 1 + 2^-9.
- Rounding x s - c element by element, to v, moves the vector by less than 4 u (fused or not, and
  with denormal numbers flushed to zero). The rest v - s p is measured as the norm of fl(v - s p),
  which moves by less than 16 u again. A sum of D squares and its root have a relative error below
  2^-9. So `error`, the measured norm times (1 + NORM_ERROR) plus UNIT_ERROR, bounds |e| and |f|.
  `length`, the norm of v times (1 + NORM_ERROR) plus `error`, bounds |a - c| and |s p|.
- |v| is below 2.01. For D < 2^15 the rest, after rounding to 1 / 127 of the largest element, has a
  norm below 0.75 |v|: `error` is below 1.6 and `length` below 3.7.
- p . q is a sum of D products of at most 127^2, below 2^31 for D <= 133,152: exact in int32.
- c . (b - c) is a sum of D terms, in any order: right to D u |b - c| |c| (`along_error * length`).
- All other steps of `bound_kernel` are less than 20 fp32 operations on numbers below 64. Each errs
  by 64 u at most: less than SCORE_ERROR together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import (
    MASKED,
    RUNTIME_SIZES,
    inverse_norm,
    reference_item,
    scale_line,
    source_item,
)

# Errors of norms and of bounds, as derived above
NORM_ERROR = tl.constexpr(2.0**-9)
UNIT_ERROR = tl.constexpr(2.0**-20)
SCORE_ERROR = tl.constexpr(2.0**-13)
# Least divisor in rounding: the largest element of a token that equals the centre is zero.
LEAST = tl.constexpr(1e-12)

# Sizes that change from call to call, as RUNTIME_SIZES
COARSE_SIZES = [
    *RUNTIME_SIZES,
    *("counts", "lists", "lists_each", "first_row", "row_count", "rows", "tiles", "column_blocks"),
    *("item_step", "items_each", "centre_step", "reference_every", "sources", "references"),
]


@triton.jit
def ordered(value):
    """int32 of the same order as fp32 values that are not NaN; its own inverse on the bits."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


# ---------------------------------------------------------------------------------------------
# Rounding
# ---------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=COARSE_SIZES)
def centre_kernel(
    tokens_ptr,
    scale_ptr,
    centre_ptr,
    M,
    D,
    item_step,
    items_each,
    stride_tb,
    stride_tm,
    stride_td,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the centres: means of samples of unit reference tokens.

        centre_c = mean of r_j / |r_j| over BLOCK_M tokens j, evenly spread over the items of c

    tokens (P, M, D), any strides; scale (P, M) from scale_kernel, which excludes tokens that are
    masked or not finite; centre (C, D) fp32. Program (k, c) owns BLOCK_K channels of centre c,
    whose items are `c * item_step` to `c * item_step + items_each - 1`. Results are right with any
    centre; a good one leaves few blocks in question.
    """
    # Sampled tokens
    number = tl.arange(0, BLOCK_M).to(tl.int64) * items_each * M // BLOCK_M
    item = tl.program_id(1).to(tl.int64) * item_step + number // M
    token = number % M
    scale = tl.load(scale_ptr + scale_line(item, M) + token)
    used = scale >= 0.0

    # Mean
    channels = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = channels < D
    value = tl.load(
        (tokens_ptr + item * stride_tb + token * stride_tm)[:, None]
        + (channels.to(tl.int64) * stride_td)[None, :],
        mask=used[:, None] & inside[None, :],
        other=0.0,
    ).to(tl.float32)
    total = tl.sum(value * tl.where(used, scale, 0.0)[:, None], axis=0)
    count = tl.sum(used.to(tl.float32), axis=0)
    tl.store(
        centre_ptr + tl.program_id(1).to(tl.int64) * D + channels,
        total / tl.maximum(count, 1.0),
        mask=inside,
    )


@triton.jit(do_not_specialize=COARSE_SIZES)
def round_kernel(
    tokens_ptr,
    scale_ptr,
    centre_ptr,
    values_ptr,
    stats_ptr,
    lower_ptr,
    counts_ptr,
    first_row,
    row_count,
    M,
    D,
    width,
    item_step,
    centre_step,
    group_size,
    counts,
    stride_tb,
    stride_tm,
    stride_td,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Round tokens `first_row` to `first_row + row_count - 1`, less their centre, to int8.

        x / |x| - c = scale * values + rest,   error >= |rest|,   length >= |x / |x| - c|

    tokens (., M, D), any strides; centre (C, D) fp32, number `item // centre_step` for an item;
    values (Q, row_count, width) int8, zero beyond D; stats (3 or 4, Q, row_count) fp32: scale,
    length, error, and for columns the offset c . (b - c). Program (i, k) owns BLOCK_M tokens.

    Columns (scale_ptr is given): item k * item_step. A token that is no candidate has the offset
    -inf, and zero in all else.
    Rows (scale_ptr is None): item `source_item(k)`. Norms are computed here; a token that is not
    finite has scale 0. Rows also set lower (Q, row_count) int32 to `ordered(-inf)`, and all
    programs together zero `counts` int32 at counts_ptr, which saves two launches.
    """
    # Tokens and their norms
    line = tl.program_id(1)
    item = line * item_step
    if scale_ptr is None:
        item = source_item(line, group_size, MODE)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < row_count
    tokens = (first_row + rows).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    wide = channels.to(tl.int64)
    value = tl.load(
        (tokens_ptr + item.to(tl.int64) * stride_tb + tokens * stride_tm)[:, None]
        + (wide * stride_td)[None, :],
        mask=inside[:, None] & (channels < D)[None, :],
        other=0.0,
    ).to(tl.float32)
    if scale_ptr is None:
        scale = inverse_norm(tl.sum(value * value, axis=1))
    else:
        scale = tl.load(scale_ptr + scale_line(item, M) + tokens, mask=inside, other=MASKED)
    used = inside & (scale >= 0.0)

    # Round to 127 steps of the largest element
    centre = tl.load(
        centre_ptr + (item // centre_step).to(tl.int64) * D + channels, mask=channels < D, other=0.0
    )
    unit = tl.where(used[:, None], value * scale[:, None] - centre[None, :], 0.0)
    largest = tl.maximum(tl.max(tl.abs(unit), axis=1), LEAST)
    whole = tl.floor(unit * (127.0 / largest)[:, None] + 0.5)
    # Rounding gives 127 at most. A larger number would wrap around unnoticed.
    whole = tl.minimum(tl.maximum(whole, -127.0), 127.0)
    step = largest / 127.0
    tl.store(
        values_ptr + ((line.to(tl.int64) * row_count + rows) * width)[:, None] + channels[None, :],
        whole.to(tl.int8),
        mask=inside[:, None] & (channels < width)[None, :],
    )

    # Bounds of the rest and of the length
    rest = unit - whole * step[:, None]
    error = tl.sqrt(tl.sum(rest * rest, axis=1)) * (1.0 + NORM_ERROR) + UNIT_ERROR
    length = tl.sqrt(tl.sum(unit * unit, axis=1)) * (1.0 + NORM_ERROR) + error
    field = tl.num_programs(1).to(tl.int64) * row_count
    stats = stats_ptr + line.to(tl.int64) * row_count + rows
    tl.store(stats, tl.where(used, step, 0.0), mask=inside)
    tl.store(stats + field, tl.where(used, length, 0.0), mask=inside)
    tl.store(stats + 2 * field, tl.where(used, error, 0.0), mask=inside)
    if scale_ptr is not None:
        offset = tl.sum(unit * centre[None, :], axis=1)
        tl.store(stats + 3 * field, tl.where(used, offset, float("-inf")), mask=inside)
    else:
        # Lower bounds and counts start empty
        nothing = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        tl.store(lower_ptr + line.to(tl.int64) * row_count + rows, ordered(nothing), mask=inside)
        program = line * tl.num_programs(0) + tl.program_id(0)
        programs = tl.num_programs(0) * tl.num_programs(1)
        for start in range(program * 128, counts, programs * 128):
            count = start + tl.arange(0, 128)
            tl.store(counts_ptr + count, tl.zeros((128,), tl.int32), mask=count < counts)


# ---------------------------------------------------------------------------------------------
# Bounds by int8 tiles
# ---------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=COARSE_SIZES)
def bias_kernel(
    row_stats_ptr,
    column_stats_ptr,
    bias_ptr,
    blocks_ptr,
    rows,
    M,
    along_error,
    references,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the part of a column's bounds that all rows share.

        bias = offset + spread,   spread = max over rows of |a - c| * error + along_error * length

    bias (Q, M) fp32 is added to all scores of a column. blocks (2, Q, column blocks) fp32: the
    largest length and the largest spread of a block's columns. row_stats (3, rows) of all `rows`
    source tokens and column_stats (4, Q, M) come from round_kernel. Program (k, q) owns BLOCK_N
    columns of item q.
    """
    # Largest length of all rows
    longest = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, rows, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        length = tl.load(row_stats_ptr + rows.to(tl.int64) + row, mask=row < rows, other=0.0)
        longest = tl.maximum(longest, length)

    # Bias of every column, and the largest of the block
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < M
    field = references.to(tl.int64) * M
    line = tl.program_id(1).to(tl.int64) * M + columns
    length = tl.load(column_stats_ptr + field + line, mask=inside, other=0.0)
    error = tl.load(column_stats_ptr + 2 * field + line, mask=inside, other=0.0)
    offset = tl.load(column_stats_ptr + 3 * field + line, mask=inside, other=0.0)
    spread = tl.max(longest, axis=0) * error + along_error * length
    tl.store(bias_ptr + line, offset + spread, mask=inside)
    block = blocks_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(block, tl.max(length, axis=0))
    tl.store(block + references * tl.num_programs(0), tl.max(spread, axis=0))


@triton.jit
def accumulate_int8(product, rows, columns, INTERPRETED: tl.constexpr):
    """`product + rows @ columns`, exact; interpreted in fp64, as numpy is slow with integers."""
    if INTERPRETED:
        rows = rows.to(tl.float64)
        columns = columns.to(tl.float64)
    return tl.dot(rows, columns, product, out_dtype=product.dtype)


@triton.jit(do_not_specialize=COARSE_SIZES)
def bound_kernel(
    row_values_ptr,
    column_values_ptr,
    row_values_descriptor,
    column_values_descriptor,
    row_stats_ptr,
    column_stats_ptr,
    bias_ptr,
    blocks_ptr,
    upper_ptr,
    lower_ptr,
    row_count,
    M,
    width,
    slots,
    products,
    group_size,
    reference_step,
    reference_every,
    sources,
    references,
    MODE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute the bounds of all rows by int8 tiles, which are walked as in tiled_match_kernel.

        score = row_scale * column_scale * (p . q) + bias
        upper = max over the block's columns of score, + row_error * length + SCORE_ERROR
        lower = max over blocks of upper - 2 (row_error * length + SCORE_ERROR + spread)

    row_values (S, row_count, width) and column_values (Q, M, width) int8, contiguous, or 3-d tensor
    descriptors of them with blocks of one item; their stats from round_kernel; bias (Q, M) and
    blocks (2, Q, column blocks), length and spread, from bias_kernel; upper (products, column
    blocks, row_count) fp32; lower (S, row_count) int32 over all slots, as `ordered`. Product number
    s * slots + slot belongs to source s and the reference that it meets in `slot`, which is row
    `reference item // reference_every` of column_values.
    """
    row_blocks = tl.cdiv(row_count, BLOCK_M)
    column_blocks = tl.cdiv(M, BLOCK_N)
    tiles = row_blocks * column_blocks
    ACCUMULATOR: tl.constexpr = tl.float64 if INTERPRETED else tl.int32
    for task in range(tl.program_id(0), products * tiles, tl.num_programs(0)):
        # Blocks of rows and columns of this tile
        product = task // tiles
        source = product // slots
        owner = source_item(source, group_size, MODE)
        other = reference_item(owner, product % slots, group_size, reference_step, MODE)
        reference = other // reference_every
        tile = task % tiles
        band = tile // (GROUP_M * column_blocks) * GROUP_M
        height = tl.minimum(row_blocks - band, GROUP_M)
        within = tile % (GROUP_M * column_blocks)
        first_row = (band + within % height) * BLOCK_M
        column_block = within // height
        first_column = column_block * BLOCK_N
        rows = first_row + tl.arange(0, BLOCK_M)
        columns = first_column + tl.arange(0, BLOCK_N)
        row_line = source.to(tl.int64) * row_count
        column_line = reference.to(tl.int64) * M

        # Products of the tile
        sums = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
        if row_values_descriptor is not None:
            for start in range(0, width, BLOCK_K):
                row_block = row_values_descriptor.load([source, first_row, start])
                column_side = column_values_descriptor.load([reference, first_column, start])
                row_block = row_block.reshape(BLOCK_M, BLOCK_K)
                column_side = column_side.reshape(BLOCK_N, BLOCK_K)
                sums = accumulate_int8(sums, row_block, column_side.T, INTERPRETED)
        else:
            row_pointers = row_values_ptr + (row_line + tl.minimum(rows, row_count - 1)) * width
            column_pointers = column_values_ptr + (column_line + tl.minimum(columns, M - 1)) * width
            for start in range(0, width, BLOCK_K):
                channels = start + tl.arange(0, BLOCK_K)
                row_block = tl.load(row_pointers[:, None] + channels[None, :])
                column_side = tl.load(column_pointers[None, :] + channels[:, None])
                sums = accumulate_int8(sums, row_block, column_side, INTERPRETED)

        # Largest upper bound of every row, and the lower bound of that column's score
        row_inside = rows < row_count
        row_stats = row_stats_ptr + row_line + rows
        row_scale = tl.load(row_stats, mask=row_inside, other=0.0)
        row_error = tl.load(
            row_stats + 2 * (sources.to(tl.int64) * row_count), mask=row_inside, other=0.0
        )
        column_inside = columns < M
        column_scale = tl.load(
            column_stats_ptr + column_line + columns, mask=column_inside, other=0.0
        )
        bias = tl.load(bias_ptr + column_line + columns, mask=column_inside, other=float("-inf"))
        block = blocks_ptr + reference * column_blocks + column_block
        reach = row_error * tl.load(block) + SCORE_ERROR
        spread = tl.load(block + references * column_blocks)
        score = sums.to(tl.float32) * column_scale[None, :] * row_scale[:, None] + bias[None, :]
        upper = tl.max(score, axis=1) + reach
        upper = tl.where(row_scale > 0.0, upper, float("-inf"))
        lower = upper - 2.0 * (reach + spread)
        line = product.to(tl.int64) * column_blocks + column_block
        tl.store(upper_ptr + line * row_count + rows, upper, mask=row_inside)
        tl.atomic_max(
            lower_ptr + row_line + rows,
            ordered(lower),
            mask=row_inside & (lower > float("-inf")),
            sem="relaxed",
        )
