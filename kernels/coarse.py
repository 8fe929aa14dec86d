"""Matching by an int8 product with proven bounds, then exact scores of the few tiles they leave.

Around a centre c, scaled tokens are a = c + s p + e and b = c + t q + f, where p and q are integers
of at most 127, and e and f are what rounding to them leaves. For the columns b of a row a,

    a . b = a . c + s t (p . q) + c . (b - c) + R,    |R| <= |e| |t q| + |a - c| |f|

where a . c is the same for all columns. `bound_kernel` keeps, of every row and block of columns,
the largest upper bound of a . b - a . c, and of every row the largest lower bound. `select_kernel`
lists the rows of each block whose upper bound reaches the row's lower bound: no other block holds
the best column. `score_kernel` multiplies the listed rows and blocks as `tiled_match_kernel` does
and raises the same keys. Where the bounds tell nothing apart, it gets all blocks: slow, and as
exact.

Why the bounds hold on a GPU, u = 2^-24 being half a unit in the last place of fp32, and D < 2^15:

- a = s_i x and b = s_j r with the fp32 scales exactly as stored. No error of a norm matters, as the
  exact kernel compares s_j <x, r>, whose order over j is that of a . b. A norm, an approximate root
  and a division are right to D u / 2 + 8 u, so that |a|, |b| and |c| are less than 1 + 2^-9.
- Rounding x s - c element by element, to v, moves the vector by less than 4 u (fused or not, and
  with denormal numbers flushed to zero). What v leaves is measured as the norm of fl(v - s p),
  which moves by less than 16 u again, and a sum of D squares and its root are right to 2^-9,
  relatively: `error` is the measured norm times (1 + NORM_ERROR) plus UNIT_ERROR. `length` is the
  norm of v times (1 + NORM_ERROR) plus `error`: it bounds |a - c| and |s p|. |v| is below 2.01 and,
  for D < 2^15, the norm of what rounding to 1 / 127 of the largest element leaves is below 0.75 of
  it: `error` is below 1.6 and `length` below 3.7.
- p . q is a sum of D products of at most 127^2, below 2^31 for D <= 133,152: exact in int32.
- c . (b - c) is a sum of D terms, in any order: right to D u |b - c| |c| (`along_error * length`).
- All else in `bound_kernel` are less than 20 fp32 operations on numbers below 64, of 64 u each:
  less than SCORE_ERROR together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .match import offer
from .shared import (
    MASKED,
    RUNTIME_SIZES,
    best_of,
    inverse_norm,
    load_scales,
    multiply,
    reference_item,
    scale_line,
    source_item,
)

NORM_ERROR = tl.constexpr(2.0**-9)
UNIT_ERROR = tl.constexpr(2.0**-20)
SCORE_ERROR = tl.constexpr(2.0**-13)
# The least size of the largest element before rounding: a token equal to the centre is rounded too.
LEAST = tl.constexpr(1e-12)

_RUNTIME = [*RUNTIME_SIZES, "counts", "lists", "lists_each", "first_row", "row_count", "rows"]
_RUNTIME += ["tiles", "column_blocks", "item_step", "items_each", "centre_step", "reference_every"]
_RUNTIME += ["sources", "references"]


@triton.jit
def ordered(value):
    """fp32, never NaN, as int32 of the same order; on its bits it is its own inverse."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


# ---------------------------------------------------------------------------------------------
# Rounding
# ---------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=_RUNTIME)
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
    """Mean of a sample of unit reference tokens: tokens (P, M, D) -> centre (C, D) fp32.

    Program (k, c) takes BLOCK_K channels of centre c, from BLOCK_M tokens spread over the items
    `c * item_step` to `c * item_step + items_each - 1`. scale (P, M) from scale_kernel leaves out
    what is masked or not finite. Any centre is right; a good one leaves little in question.
    """
    number = tl.arange(0, BLOCK_M).to(tl.int64) * items_each * M // BLOCK_M
    item = tl.program_id(1).to(tl.int64) * item_step + number // M
    token = number % M
    scale = tl.load(scale_ptr + scale_line(item, M) + token)
    used = scale >= 0.0
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


@triton.jit(do_not_specialize=_RUNTIME)
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
    """Tokens first_row to first_row + row_count - 1 of items, rounded to int8 less their centre.

    tokens (., M, D), any strides; centre (C, D) fp32, number `item // centre_step` for an item;
    values (Q, row_count, width) int8, zero beyond D; stats (3 or 4, Q, row_count) fp32: scale,
    length, error, and for columns the offset c . (b - c). Program (i, k) owns BLOCK_M tokens.

    Columns (scale_ptr given): item k * item_step; tokens that are no candidate have offset -inf and
    zero in all else. Rows: item `source_item(k)`, whose scale is computed here; tokens that are not
    finite have a scale of 0. Rows also set lower (Q, row_count) int32 to -inf, as an order, and all
    programs together zero `counts` int32 at counts_ptr, which saves a launch each.
    """
    # Which tokens
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

    # Round
    centre = tl.load(
        centre_ptr + (item // centre_step).to(tl.int64) * D + channels, mask=channels < D, other=0.0
    )
    unit = tl.where(used[:, None], value * scale[:, None] - centre[None, :], 0.0)
    largest = tl.maximum(tl.max(tl.abs(unit), axis=1), LEAST)
    whole = tl.floor(unit * (127.0 / largest)[:, None] + 0.5)
    # Its rounding leaves 127 at most; nothing would show if it did not.
    whole = tl.minimum(tl.maximum(whole, -127.0), 127.0)
    step = largest / 127.0
    tl.store(
        values_ptr + ((line.to(tl.int64) * row_count + rows) * width)[:, None] + channels[None, :],
        whole.to(tl.int8),
        mask=inside[:, None] & (channels < width)[None, :],
    )

    # Bounds
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
@triton.jit(do_not_specialize=_RUNTIME)
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
    """The part of a column's bounds that all rows share: the offset and the largest |a - c| |f|.

    bias (Q, M) fp32 is added to the scores of a column; blocks (2, Q, column blocks) fp32 are the
    largest length of a block's columns, and the largest of what bias holds beyond their offset.
    Program (k, q) owns BLOCK_N columns of item q. row_stats (3, rows) of all `rows` source tokens
    and column_stats (4, Q, M) are round_kernel's.
    """
    longest = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, rows, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        length = tl.load(row_stats_ptr + rows.to(tl.int64) + row, mask=row < rows, other=0.0)
        longest = tl.maximum(longest, length)

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
    """`product + rows @ columns`, exact; in fp64 where interpreted, since numpy is slow in int."""
    if INTERPRETED:
        rows = rows.to(tl.float64)
        columns = columns.to(tl.float64)
    return tl.dot(rows, columns, product, out_dtype=product.dtype)


@triton.jit(do_not_specialize=_RUNTIME)
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
    """Bounds of all tiles: upper (products, column blocks, rows) fp32, lower (sources, rows) int32.

    row_values (S, row_count, width) and column_values (Q, M, width) int8, contiguous, or 3-d tensor
    descriptors of them with blocks of one item; their stats from round_kernel; bias (Q, M) and
    blocks (2, Q, column blocks) from bias_kernel. Product
    number s * slots + slot is that of source s and the reference it meets in `slot`, which is row
    `reference item // reference_every` of column_values. lower is over all slots, as `ordered`.

    Tiles are walked as tiled_match_kernel walks them.
    """
    row_blocks = tl.cdiv(row_count, BLOCK_M)
    column_blocks = tl.cdiv(M, BLOCK_N)
    tiles = row_blocks * column_blocks
    ACCUMULATOR: tl.constexpr = tl.float64 if INTERPRETED else tl.int32
    for task in range(tl.program_id(0), products * tiles, tl.num_programs(0)):
        # Which tile
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

        # Product
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

        # Largest upper bound of every row, and what that column's score is at least
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


# ---------------------------------------------------------------------------------------------
# Which blocks of columns are in question, and their exact scores
# ---------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=_RUNTIME)
def select_kernel(
    upper_ptr,
    lower_ptr,
    counts_ptr,
    listed_ptr,
    tasks_ptr,
    row_count,
    lists,
    lists_each,
    tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Lists the rows whose upper bound in a block of columns reaches their lower bound.

    upper (lists, row_count), lower (S, row_count) from bound_kernel; list number
    s * lists_each + k is block k of all columns that source s meets. listed (lists, row_count)
    int32 are the rows, counts (lists + 1) int32 their number, zero before. The last count is that
    of tasks (lists * tiles) int32, one for each TILE rows of a list: list * tiles + number of the
    tile. Program (i, s) owns BLOCK_M <= TILE rows of source s. The order of rows and of tasks
    differs from run to run; what is listed does not.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < row_count
    source = tl.program_id(1)
    order = tl.load(lower_ptr + source.to(tl.int64) * row_count + rows, mask=inside, other=0)
    lower = tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)
    for start in range(0, lists_each, BLOCK_N):
        number = start + tl.arange(0, BLOCK_N)
        mine = number < lists_each
        number += source * lists_each
        line = number.to(tl.int64) * row_count
        upper = tl.load(
            upper_ptr + line[:, None] + rows[None, :],
            mask=mine[:, None] & inside[None, :],
            other=float("-inf"),
        )
        chosen = (upper >= lower[None, :]) & (upper > float("-inf"))
        place = tl.cumsum(chosen.to(tl.int32), axis=1)
        count = tl.sum(chosen.to(tl.int32), axis=1)
        some = mine & (count > 0)
        before = tl.atomic_add(counts_ptr + number, count, mask=some, sem="relaxed")
        before = tl.where(some, before, 0)
        tl.store(
            listed_ptr + (line + before - 1)[:, None] + place,
            tl.zeros((BLOCK_N, BLOCK_M), tl.int32) + rows[None, :],
            mask=chosen,
        )
        # These rows begin a tile where a multiple of TILE lies among their places.
        tile = tl.cdiv(before, TILE)
        begins = some & (tile * TILE < before + count)
        task = tl.atomic_add(
            counts_ptr + lists + tl.zeros((BLOCK_N,), tl.int32), 1, mask=begins, sem="relaxed"
        )
        tl.store(tasks_ptr + task, number * tiles + tile, mask=begins)


@triton.jit(do_not_specialize=_RUNTIME)
def score_kernel(
    x_ptr,
    reference_ptr,
    scale_ptr,
    key_ptr,
    counts_ptr,
    listed_ptr,
    tasks_ptr,
    first_row,
    row_count,
    N,
    M,
    D,
    slots,
    lists,
    tiles,
    column_blocks,
    group_size,
    reference_step,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_rb,
    stride_rm,
    stride_rd,
    MODE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Raise the keys (B, 1, N) of listed rows to the best candidates of their blocks of columns.

    A task is BLOCK_M rows of a list and the SPLIT * BLOCK_N columns of its block, in SPLIT parts;
    program p takes the parts p, p + programs, ... The number of tasks is read from memory, so the
    grid does not depend on it. Every key of a row comes from here, so that equal tokens tie.
    """
    parts = tl.load(counts_ptr + lists) * SPLIT
    for part in range(tl.program_id(0), parts, tl.num_programs(0)):
        # Which rows and columns
        task = tl.load(tasks_ptr + part // SPLIT)
        number = task // tiles
        product = number // column_blocks
        slot = product % slots
        owner = source_item(product // slots, group_size, MODE)
        other = reference_item(owner, slot, group_size, reference_step, MODE).to(tl.int64)
        first_column = (number % column_blocks * SPLIT + part % SPLIT) * BLOCK_N
        columns = first_column + tl.arange(0, BLOCK_N)
        first = task % tiles * BLOCK_M
        left = tl.load(counts_ptr + number) - first
        lanes = tl.arange(0, BLOCK_M)
        # Lanes past the end repeat the last row, whose key they cannot change.
        places = number.to(tl.int64) * row_count + first + tl.minimum(lanes, left - 1)
        rows = (first_row + tl.load(listed_ptr + places)).to(tl.int64)

        # Product
        similarities = multiply(
            x_ptr + owner.to(tl.int64) * stride_xb + rows * stride_xn,
            stride_xd,
            reference_ptr + other * stride_rb + tl.minimum(columns, M - 1).to(tl.int64) * stride_rm,
            stride_rd,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            INTERPRETED,
        )

        # Best column of every row
        scale = load_scales(scale_ptr, other, columns, M)
        best, position = best_of(similarities * scale[None, :], 1, INTERPRETED)
        offer(
            key_ptr + owner.to(tl.int64) * N + rows,
            best,
            slot * M + first_column + position,
            lanes < left,
        )
