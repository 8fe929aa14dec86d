"""Find the best reference token of every source token without storing the N x M similarities.

    j*(i) = argmax over allowed j of <x_i, r_j> / max(|r_j|, 1e-12)

Matching of NegToMe (arXiv 2412.01339). `tiled_match_kernel` walks the tiles of all similarity
matrices. Every source token has one 64-bit key, which each tile raises to its best (score, token).
A maximum does not depend on the order in which tiles finish, so results are deterministic. In
`fused.py` a program owns its rows instead; docs/kernels.md says why both kernels exist.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .division import quotient
from .shared import (
    MASKED,
    NON_FINITE,
    RUNTIME_SIZES,
    accumulate,
    best_of,
    exact_cosine,
    inverse_norm,
    load_scales,
    multiply,
    product_items,
    reference_item,
    scale_line,
)

# Key without a candidate: less than every packed candidate.
NO_KEY = tl.constexpr(-(2**63))


# ---------------------------------------------------------------------------------------------
# Keys: (score, token) as one integer whose order is "larger score, then lower token"
# ---------------------------------------------------------------------------------------------
@triton.jit
def pack(score, token):
    """int64 keys of fp32 scores (not NaN) and int32 tokens (not negative)."""
    # -0.0 equals 0.0, but their bits differ.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    # The bits of negative floats have the reverse order: flip all but the sign.
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    # Token 0 gets the largest number, so the lower token wins a tie.
    return (ordered << 32) | (token ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def unpack(key):
    """int32 tokens of keys, -1 for keys without a candidate."""
    token = (key & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF
    return tl.where(key == NO_KEY, -1, token)


@triton.jit
def offer(key_pointers, score, token, inside):
    """Raise keys in memory to better candidates; a score of -inf or NaN is no candidate."""
    tl.atomic_max(
        key_pointers,
        pack(score, token),
        mask=inside & (score > float("-inf")),
        sem="relaxed",
    )


# ---------------------------------------------------------------------------------------------
# Before matching: column scales, and keys without candidates
# ---------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["M", "item_step", "keys", "stride_mb", "stride_mm"])
def scale_kernel(
    tokens_ptr,
    mask_ptr,
    scale_ptr,
    key_ptr,
    M,
    D,
    item_step,
    keys,
    stride_tb,
    stride_tm,
    stride_td,
    stride_mb,
    stride_mm,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the scale of every token, and empty the keys.

        scale = 1 / max(|token|, 1e-12), or MASKED, or NON_FINITE

    tokens (P, M, D), any strides; mask (P, M) uint8 or None; scale (P, M rounded up to a multiple
    of SCALE_BLOCK) fp32, contiguous, MASKED beyond M. Program (i, p) owns BLOCK_M tokens of item
    `p * item_step`: reference "first" needs only the heads of the groups. All programs together set
    `keys` int64 keys at key_ptr to NO_KEY, which saves a launch.
    """
    # Squared norms
    item = (tl.program_id(1) * item_step).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tokens < M
    pointers = tokens_ptr + item * stride_tb + tokens.to(tl.int64) * stride_tm
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, D, BLOCK_K):
        channels = start + tl.arange(0, BLOCK_K)
        token = tl.load(
            pointers[:, None] + (channels.to(tl.int64) * stride_td)[None, :],
            mask=inside[:, None] & (channels < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        squares += tl.sum(token * token, axis=1)

    # Scales
    scale = inverse_norm(squares)
    if mask_ptr is not None:
        allowed = tl.load(
            mask_ptr + item * stride_mb + tokens.to(tl.int64) * stride_mm, mask=inside, other=0
        )
        scale = tl.where((allowed != 0) | (scale == NON_FINITE), scale, MASKED)
    # Programs cover whole blocks of scales, so the store needs no mask.
    tl.store(scale_ptr + scale_line(item, M) + tokens, tl.where(inside, scale, MASKED))

    # Empty keys
    if key_ptr is not None:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        programs = tl.num_programs(0) * tl.num_programs(1)
        for start in range(program * BLOCK_K, keys, programs * BLOCK_K):
            key = start + tl.arange(0, BLOCK_K)
            empty = tl.full((BLOCK_K,), NO_KEY, tl.int64)
            tl.store(key_ptr + key, empty, mask=key < keys)


# ---------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def tiled_match_kernel(
    row_ptr,
    column_ptr,
    row_descriptor,
    column_descriptor,
    scale_ptr,
    key_ptr,
    N,
    M,
    D,
    slots,
    first_product,
    products,
    group_size,
    reference_step,
    tile_code,
    band_code,
    tail_code,
    product_code,
    circle_code,
    stride_rb,
    stride_rn,
    stride_rd,
    stride_cb,
    stride_cm,
    stride_cd,
    MODE: tl.constexpr,
    OFFICIAL: tl.constexpr,
    PAIRS: tl.constexpr,
    UNION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Raise the keys to the best candidates of all tiles of similarities.

        key(i) = max over tiles of max over columns j of (<row_i, column_j> * scale_j, j)

    rows (., N, D) and columns (., M, D), any strides, or 3-d tensor descriptors of them with blocks
    of one item; scale from scale_kernel: those of the columns, and with PAIRS also of the rows;
    keys (B, C, N) int64, or (B, 1, N) with UNION.

    paper:    rows are source tokens, columns reference tokens.
    official: rows are reference tokens, columns source tokens (N == M).
    PAIRS:    mode "others", where rows and columns are the same tensor: one tile serves both items
              of a pair, one by its row maxima, the other by its column maxima.
    UNION:    one key for all slots, whose token is slot * M + token (paper only).

    Matrices `first_product` to `first_product + products - 1` are cut into tiles. Program p takes
    the tiles p, p + programs, ...; within a matrix GROUP_M blocks of rows meet all columns before
    the next GROUP_M blocks start, so that programs that run together share both sides in the L2
    cache. Codes replace divisions (division.py). tile_code: by the tiles of a matrix; band_code: by
    the tiles of GROUP_M blocks of rows; tail_code: by the blocks of rows after the last whole
    GROUP_M; product_code and circle_code: see product_items.
    """
    row_blocks = tl.cdiv(N, BLOCK_M)
    column_blocks = tl.cdiv(M, BLOCK_N)
    tiles = row_blocks * column_blocks
    whole_rows = row_blocks // GROUP_M * GROUP_M
    # In a flattened loop, loads by pointers are no longer pipelined.
    FLAT: tl.constexpr = FLATTEN and row_descriptor is not None
    for task in tl.range(tl.program_id(0), products * tiles, tl.num_programs(0), flatten=FLAT):
        # Items of this product, and the key that each side raises
        product = quotient(task, tile_code)
        first, second, second_slot, first_slot = product_items(
            first_product + product,
            slots,
            group_size,
            reference_step,
            product_code,
            circle_code,
            MODE,
            PAIRS,
        )
        row_item, column_item = first, second
        row_owner, row_slot = first, second_slot
        column_owner, column_slot = second, first_slot
        if OFFICIAL:
            # Rows are reference tokens; their matches belong to the item of the columns.
            if PAIRS:
                row_owner, row_slot = second, first_slot
                column_owner, column_slot = first, second_slot
            else:
                row_item, column_item = second, first

        # Blocks of rows and columns of this tile
        tile = task - product * tiles
        band = quotient(tile, band_code)
        within = tile - band * (GROUP_M * column_blocks)
        band *= GROUP_M
        height = tl.where(band == whole_rows, row_blocks - whole_rows, GROUP_M)
        column_block = tl.where(band == whole_rows, quotient(within, tail_code), within // GROUP_M)
        row_block = within - column_block * height
        first_row = (band + row_block) * BLOCK_M
        first_column = column_block * BLOCK_N
        rows = first_row + tl.arange(0, BLOCK_M)
        columns = first_column + tl.arange(0, BLOCK_N)

        # Similarities of the tile
        if row_descriptor is not None:
            ACCUMULATOR: tl.constexpr = tl.float64 if INTERPRETED else tl.float32
            similarities = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
            for start in range(0, D, BLOCK_K):
                row_block_values = row_descriptor.load([row_item, first_row, start])
                column_block_values = column_descriptor.load([column_item, first_column, start])
                similarities = accumulate(
                    similarities,
                    row_block_values.reshape(BLOCK_M, BLOCK_K),
                    column_block_values.reshape(BLOCK_N, BLOCK_K).T,
                    INTERPRETED,
                )
            similarities = similarities.to(tl.float32)
        else:
            row_pointers = row_ptr + row_item.to(tl.int64) * stride_rb
            column_pointers = column_ptr + column_item.to(tl.int64) * stride_cb
            similarities = multiply(
                row_pointers + tl.minimum(rows, N - 1).to(tl.int64) * stride_rn,
                stride_rd,
                column_pointers + tl.minimum(columns, M - 1).to(tl.int64) * stride_cm,
                stride_cd,
                D,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                INTERPRETED,
            )

        # Maximum of every row
        scale = load_scales(scale_ptr, column_item, columns, M)
        best, position = best_of(similarities * scale[None, :], 1, INTERPRETED)
        token = first_column + position
        line = row_owner.to(tl.int64)
        if UNION:
            token += row_slot * M
        else:
            line = line * slots + row_slot
        offer(key_ptr + line * N + rows, best, token, rows < N)

        # Maximum of every column
        if PAIRS:
            scale = load_scales(scale_ptr, row_item, rows, N)
            best, position = best_of(similarities * scale[:, None], 0, INTERPRETED)
            token = first_row + position
            line = column_owner.to(tl.int64)
            if UNION:
                token += column_slot * N
            else:
                line = line * slots + column_slot
            offer(key_ptr + line * M + columns, best, token, columns < M)


# ---------------------------------------------------------------------------------------------
# From keys to similarity and index
# ---------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def resolve_kernel(
    x_ptr,
    reference_ptr,
    x_scale_ptr,
    reference_scale_ptr,
    key_ptr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Turn keys into similarity and index; -inf and -1 where there is no match.

        paper:    similarity_i = cos(x_i, r_j),  j the token of the key
        official: similarity_i = cos(r_i, x_j),  and the push is away from r_j

    x (B, N, D), reference (P, M, D), any strides; keys (B, C, N) int64; similarity (B, C, N) fp32;
    index (B, C, N) int64. Program (i, b) owns BLOCK_M tokens of item b in all slots. The cosine is
    recomputed in fp32 from the two tokens, so it does not depend on the tile that found them.

    With paper matching x_scale_ptr is not read. With official matching there is no match where
    token i is masked or x_i, r_i or r_j is not finite.
    """
    # Rows of this program
    item = tl.program_id(1)
    wide_item = item.to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < N
    wide_rows = rows.to(tl.int64)
    for slot in range(slots):
        # Token of every row
        line = (wide_item * slots + slot) * N + rows
        token = unpack(tl.load(key_ptr + line, mask=row_inside, other=NO_KEY)).to(tl.int64)
        found = row_inside & (token >= 0)
        other = reference_item(item, slot, group_size, reference_step, MODE).to(tl.int64)

        # Cosine of the pair
        if OFFICIAL:
            reference_scale = tl.load(
                reference_scale_ptr + scale_line(other, M) + rows, mask=found, other=MASKED
            )
            source_scale = tl.load(
                x_scale_ptr + scale_line(wide_item, N) + rows, mask=found, other=NON_FINITE
            )
            away_scale = tl.load(
                reference_scale_ptr + scale_line(other, M) + token, mask=found, other=0.0
            )
            found = (
                found
                & (reference_scale >= 0.0)
                & (source_scale >= 0.0)
                & (away_scale != NON_FINITE)
            )
            match_scale = tl.load(
                x_scale_ptr + scale_line(wide_item, N) + token, mask=found, other=0.0
            )
            similarity = exact_cosine(
                reference_ptr + other * stride_rb + wide_rows * stride_rm,
                stride_rd,
                x_ptr + wide_item * stride_xb + token * stride_xn,
                stride_xd,
                match_scale,
                found,
                D,
                BLOCK_M,
                BLOCK_K,
            )
        else:
            match_scale = tl.load(
                reference_scale_ptr + scale_line(other, M) + token, mask=found, other=0.0
            )
            similarity = exact_cosine(
                x_ptr + wide_item * stride_xb + wide_rows * stride_xn,
                stride_xd,
                reference_ptr + other * stride_rb + token * stride_rm,
                stride_rd,
                match_scale,
                found,
                D,
                BLOCK_M,
                BLOCK_K,
            )
        found = similarity > float("-inf")
        tl.store(similarity_ptr + line, similarity, mask=row_inside)
        tl.store(index_ptr + line, tl.where(found, token, -1), mask=row_inside)
