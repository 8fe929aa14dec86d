"""Score exactly the blocks of columns that the bounds of coarse.py leave in question.

    j*(i) = argmax over j of <x_i, r_j> / max(|r_j|, 1e-12), over the blocks with upper >= lower

`select_kernel` lists the rows of each block whose upper bound reaches the row's lower bound.
`score_kernel` multiplies the listed rows and blocks as `tiled_match_kernel` does, and raises the
same keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .coarse import COARSE_SIZES
from .match import offer
from .shared import best_of, load_scales, multiply, reference_item, source_item


@triton.jit(do_not_specialize=COARSE_SIZES)
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
    """List the rows of each block of columns with upper >= lower, and the tasks to score them.

    upper (lists, row_count), lower (S, row_count) from bound_kernel; list number s * lists_each + k
    is block k of all columns that source s meets. listed (lists, row_count) int32: the rows of
    every list. counts (lists + 1) int32, zero before: the number of its rows, and last the number
    of tasks. tasks (lists * tiles) int32: one for each TILE rows of a list, as list * tiles + tile.
    Program (i, s) owns BLOCK_M <= TILE rows of source s. The order of rows and tasks differs from
    run to run; the rows and tasks themselves do not.
    """
    # Lower bounds of the rows of this program
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < row_count
    source = tl.program_id(1)
    order = tl.load(lower_ptr + source.to(tl.int64) * row_count + rows, mask=inside, other=0)
    lower = tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)
    for start in range(0, lists_each, BLOCK_N):
        # Rows in question of BLOCK_N lists
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

        # Append them to the lists
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

        # A new task for every list in which these rows begin a tile: a place is a multiple of TILE
        tile = tl.cdiv(before, TILE)
        begins = some & (tile * TILE < before + count)
        task = tl.atomic_add(
            counts_ptr + lists + tl.zeros((BLOCK_N,), tl.int32), 1, mask=begins, sem="relaxed"
        )
        tl.store(tasks_ptr + task, number * tiles + tile, mask=begins)


@triton.jit(do_not_specialize=COARSE_SIZES)
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
    """Raise the keys of listed rows to the best candidates of their blocks of columns.

    x (B, N, D), reference (P, M, D), any strides; scale (P, M) from scale_kernel; counts, listed,
    tasks from select_kernel; keys (B, 1, N) int64, whose token is slot * M + token. A task is
    BLOCK_M rows of a list and the SPLIT * BLOCK_N columns of its block, in SPLIT parts. Program p
    takes the parts p, p + programs, ...; it reads their number from memory, so the grid does not
    depend on it. All candidates of a row come from this kernel, so equal tokens tie.
    """
    parts = tl.load(counts_ptr + lists) * SPLIT
    for part in range(tl.program_id(0), parts, tl.num_programs(0)):
        # Rows and columns of this part
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
        # Lanes past the end repeat the last row and offer no candidate.
        places = number.to(tl.int64) * row_count + first + tl.minimum(lanes, left - 1)
        rows = (first_row + tl.load(listed_ptr + places)).to(tl.int64)

        # Similarities of the tile
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

        # Maximum of every row
        scale = load_scales(scale_ptr, other, columns, M)
        best, position = best_of(similarities * scale[None, :], 1, INTERPRETED)
        offer(
            key_ptr + owner.to(tl.int64) * N + rows,
            best,
            slot * M + first_column + position,
            lanes < left,
        )
