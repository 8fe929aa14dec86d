"""The operator in plain torch with linear memory: CPU, MPS, and GPUs without Triton.

Similarities exist one tile at a time: a block of reference tokens is normalised once, every
source chunk is multiplied with it, and a running `(maximum, index)` is kept for each token.
Only columns are normalised: the norm of a source token does not change its argmax. On a CPU with
int8 instructions most of the work is left to the products of `coarse`. On a GPU the
fp32 products follow `torch.set_float32_matmul_precision`: leave it at "highest" for exact matches.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.pairing import Pairing
from ..reference import NOTHING, compute_dtype, is_finite
from . import coarse, small
from .coarse import EPSILON, RUN, Search, improve, padded, piece_rows

#: Size of a block of normalised reference tokens: 8 MB in fp32.
BLOCK_ELEMENTS = 2 * 2**20
#: Tokens that are pushed at a time, on an accelerator.
PUSH_ROWS = 1024


class _Pairs(NamedTuple):
    """All pairs `(item, slot, reference item)`, by the item whose tokens are columns.

    `even`: as many pairs for each, so that one batched product serves all; then the tensors `(P,)`
    are their parts.
    """

    by_columns: dict[int, list[tuple[int, int, int]]]
    even: bool
    items: Tensor
    slots: Tensor
    others: Tensor


@lru_cache(maxsize=64)
def _pairs(pairing: Pairing, matching: str) -> _Pairs:
    by_columns: dict[int, list[tuple[int, int, int]]] = {}
    for item in pairing.sources:
        for slot in range(pairing.slots):
            pair = (item, slot, pairing.reference_item(item, slot))
            by_columns.setdefault(pair[2] if matching == "paper" else item, []).append(pair)
    even = len({len(members) for members in by_columns.values()}) == 1
    flat = [pair for members in by_columns.values() for pair in members]
    with torch.inference_mode(False):
        parts = torch.tensor(flat, dtype=torch.int64, device="cpu").reshape(-1, 3).unbind(1)
    return _Pairs(by_columns, even, *parts)


class _Tiles:
    """Tile sizes, and the scratch memory that all tiles share.

    Matrix products of about a thousand rows run near the full speed of a CPU's library; smaller
    ones pay for packing their operands, larger ones only cost memory.
    """

    def __init__(self, x: Tensor, reference: Tensor) -> None:
        dtype = compute_dtype(x.dtype)
        longest = max(x.shape[1], reference.shape[1])
        self.rows = min(longest, 1024 if x.device.type == "cpu" else 4096)
        fitting = BLOCK_ELEMENTS // x.shape[2] // RUN * RUN
        self.columns = min(padded(longest), 4096, max(256, fitting))
        self.scores = torch.empty(self.rows * self.columns, dtype=dtype, device=x.device)

    def product(self, rows: Tensor, columns: Tensor) -> Tensor:
        """`rows @ columns.T` in the scratch memory; overwritten by the next product."""
        shape = (rows.shape[0], columns.shape[0])
        scores = self.scores[: shape[0] * shape[1]].view(shape)
        return torch.mm(rows, columns.T, out=scores)


def _normalized_block(block: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Unit-length columns, zero where they may not be chosen, and the mask of those."""
    norm = torch.linalg.vector_norm(block, dim=-1)
    usable = norm.isfinite() if allowed is None else norm.isfinite() & allowed
    # Looking at the mask costs a synchronisation on an accelerator, and masking nothing is cheap.
    if block.device.type == "cpu" and bool(usable.all()):
        return block / norm.clamp_min(EPSILON)[:, None], None
    scaled = torch.where(usable[:, None], block / norm.clamp_min(EPSILON)[:, None], 0.0)
    return scaled, ~usable


def _row_maximum(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row and its lowest index.

    On a CPU a maximum without index is vectorised and one with index is not, so the index is
    looked for only in the run of columns that holds the maximum.
    """
    rows, columns = scores.shape
    if scores.device.type != "cpu" or columns == RUN:
        return scores.max(dim=1)
    runs = scores.view(rows, columns // RUN, RUN)
    run = runs.amax(dim=2).max(dim=1).indices
    value, offset = runs[torch.arange(rows, device=scores.device), run].max(dim=1)
    return value, run * RUN + offset


def _search(
    columns: Tensor,
    allowed: Tensor | None,
    searches: list[Search],
    tiles: _Tiles,
) -> None:
    """Fill in the best column for the rows of every search."""
    dtype = tiles.scores.dtype
    for start in range(0, columns.shape[0], tiles.columns):
        block = columns[start : start + tiles.columns].to(dtype)
        part = None if allowed is None else allowed[start : start + tiles.columns]
        block, excluded = _normalized_block(block, part)
        count, ragged = len(block), padded(len(block)) - len(block)
        if ragged:
            block = F.pad(block, (0, 0, 0, ragged))
            excluded = None if excluded is None else F.pad(excluded, (0, ragged), value=True)
        for rows, best, index in searches:
            for first in range(0, rows.shape[0], tiles.rows):
                chunk = slice(first, first + tiles.rows)
                scores = tiles.product(rows[chunk].to(dtype), block)
                if excluded is not None:
                    scores.masked_fill_(excluded, NOTHING)
                elif ragged:
                    scores[:, count:] = NOTHING
                value, at = _row_maximum(scores)
                improve(best[chunk], index[chunk], value, at + start)


def match(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    reference_mask: Tensor | None,
    matching: str,
) -> tuple[Tensor, Tensor]:
    """See `negtome_fast.reference.match`."""
    if small.fits(x, reference, pairing):
        return small.match(x, reference, pairing, reference_mask, matching)
    dtype = compute_dtype(x.dtype)
    shape = (x.shape[0], pairing.slots, x.shape[1])
    similarity = torch.full(shape, NOTHING, dtype=dtype, device=x.device)
    index = torch.full(shape, -1, dtype=torch.int64, device=x.device)
    pairs = _pairs(pairing, matching)
    tiles = _Tiles(x, reference)
    for shared, members in pairs.by_columns.items():
        columns = reference[shared] if matching == "paper" else x[shared]
        allowed = None
        if reference_mask is not None and matching == "paper":
            allowed = reference_mask[shared]
        searches = [
            Search(x[i] if matching == "paper" else reference[o], similarity[i, s], index[i, s])
            for i, s, o in members
        ]
        if coarse.pays(columns, searches):
            coarse.search(columns, allowed, searches, partial(_search, tiles=tiles))
        else:
            _search(columns, allowed, searches, tiles)

    for item, slot, other in (pair for part in pairs.by_columns.values() for pair in part):
        rows = x[item] if matching == "paper" else reference[other]
        best, chosen = similarity[item, slot], index[item, slot]
        for first in range(0, rows.shape[0], PUSH_ROWS):
            chunk = slice(first, first + PUSH_ROWS)
            norm = torch.linalg.vector_norm(rows[chunk].to(dtype), dim=-1)
            scaled = best[chunk] / norm.clamp_min(EPSILON)
            found = norm.isfinite() & (chosen[chunk] >= 0)
            if matching == "official":
                found &= is_finite(x[item, chunk].to(dtype))
                found &= is_finite(reference[other, chosen[chunk].clamp_min(0)].to(dtype))
                if reference_mask is not None:
                    found &= reference_mask[other, chunk]
            best[chunk] = scaled.where(found, NOTHING)
            chosen[chunk] = chosen[chunk].where(found, -1)
    return similarity, index


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def guide(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    alpha: Tensor,
    threshold: Tensor,
    reference_mask: Tensor | None,
    movable: Tensor | None,
    matching: str,
    combine: str,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `negtome_fast.reference.guide`."""
    if small.fits(x, reference, pairing):
        return small.guide(
            x,
            reference,
            pairing,
            alpha,
            threshold,
            reference_mask,
            movable,
            matching,
            combine,
            out,
        )
    if out is x and pairing.mode != "first" and _shares_memory(x, reference):
        # A token that has moved must not serve as a reference of the next item.
        moved = torch.empty_like(x)
        result = guide(
            x,
            reference,
            pairing,
            alpha,
            threshold,
            reference_mask,
            movable,
            matching,
            combine,
            moved,
        )
        x.copy_(moved)
        return result

    dtype = compute_dtype(x.dtype)
    tokens = reference.shape[1]
    alpha = alpha.to(x.device, dtype).expand(pairing.slots)
    threshold = threshold.to(x.device, dtype).expand(pairing.slots)
    similarity, index = match(x, reference, pairing, reference_mask, matching)
    pushed = similarity > threshold[:, None]
    if movable is not None:
        pushed &= movable[:, None]
    flat = index
    if pairing.slots > 1:
        slots = torch.arange(pairing.slots, device=x.device)[:, None]
        flat = index + slots * tokens
        if combine == "nearest":
            similarity, best_slot = similarity.max(dim=1, keepdim=True)
            flat, pushed = flat.gather(1, best_slot), pushed.gather(1, best_slot)
    flat = torch.where(pushed, flat, -1)

    if out is not x and pairing.mode == "first":
        for item in range(0, pairing.items, pairing.group_size):
            out[item].copy_(x[item])
    for item in pairing.sources:
        _push_item(x[item], reference, pairing, item, alpha, flat[item], out[item])
    return similarity, flat


def _push_item(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    item: int,
    alpha: Tensor,
    flat: Tensor,
    out: Tensor,
) -> None:
    """Write one item, `(N, D)`, to `out`; tokens whose entries of `flat` `(S, N)` are not negative
    are moved."""
    rows = PUSH_ROWS if x.device.type != "cpu" else piece_rows(x.shape[1])
    for first in range(0, x.shape[0], rows):
        chunk = slice(first, first + rows)
        source, target, numbers = x[chunk], out[chunk], flat[:, chunk]
        moves = (numbers >= 0).any(dim=0)
        if x.device.type != "cpu":
            moved = _moved(source, numbers, reference, pairing, item, alpha)
            torch.where(moves[:, None], moved, source, out=target)
        elif bool(moves.all()):
            _moved(source, numbers, reference, pairing, item, alpha, out=target)
        else:
            if out is not x:
                target.copy_(source)
            selected = moves.nonzero()[:, 0]
            if selected.numel():
                tokens, numbers = source.index_select(0, selected), numbers[:, selected]
                moved = _moved(tokens, numbers, reference, pairing, item, alpha)
                target.index_copy_(0, selected, moved)


def _moved(
    tokens: Tensor,
    numbers: Tensor,
    reference: Tensor,
    pairing: Pairing,
    item: int,
    alpha: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Tokens `(K, D)` of an item, away from the reference tokens `numbers` `(S, K)`; -1: none.

    Where S is 1, -1 gives no meaningful token. `out` may be `tokens`.
    """
    dtype, length = alpha.dtype, reference.shape[1]
    original = tokens.to(dtype)
    out = torch.empty_like(tokens) if out is None else out
    moved = original
    for number in numbers:
        token = number.clamp_min(0)
        if pairing.slots == 1:
            strength = alpha
            chosen = reference[pairing.reference_item(item, 0)].index_select(0, token)
        else:
            slot = token // length
            strength = alpha[slot][:, None]
            chosen = reference[pairing.reference_item(item, slot), token % length]
        chosen = chosen.to(dtype)
        step = torch.sub(original, chosen, out=chosen).mul_(strength)
        if len(numbers) == 1:
            return torch.add(step, original, out=out)
        moved = torch.where((number >= 0)[:, None], step.add_(moved), moved)
    return out.copy_(moved)
