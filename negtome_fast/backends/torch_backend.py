"""The operator in plain torch with linear memory: CPU, MPS, and GPUs without Triton.

Similarities exist one tile at a time: a block of reference tokens is normalised once, every
source chunk is multiplied with it, and a running `(maximum, index)` is kept for each token.
Only columns are normalised: the norm of a source token does not change its argmax. On a GPU the
fp32 products follow `torch.set_float32_matmul_precision`: leave it at "highest" for exact matches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.pairing import Pairing
from ..reference import NOTHING, compute_dtype, is_finite

EPSILON = 1e-12
#: Size of a block of normalised reference tokens: 8 MB in fp32.
BLOCK_ELEMENTS = 2 * 2**20
#: Columns come in whole runs: the maximum is found run by run, and a matrix library rounds the
#: columns at the ragged end of a product otherwise, which would decide between equal tokens.
RUN = 64
#: Tokens that are pushed at a time.
PUSH_ROWS = 1024
#: Elements up to which all pairs of items are matched, or all items pushed, at once: for small
#: problems the calls cost more than the arithmetic.
SMALL = 4 * 2**20


def _padded(columns: int) -> int:
    return -(-columns // RUN) * RUN


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
        self.columns = min(_padded(longest), 4096, max(256, fitting))
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
    if scores.device.type != "cpu":
        return scores.max(dim=1)
    runs = scores.view(rows, columns // RUN, RUN)
    run = runs.amax(dim=2).max(dim=1).indices
    value, offset = runs[torch.arange(rows, device=scores.device), run].max(dim=1)
    return value, run * RUN + offset


def _search(
    columns: Tensor,
    allowed: Tensor | None,
    searches: list[tuple[Tensor, Tensor, Tensor]],
    tiles: _Tiles,
) -> None:
    """For each `(rows, best, index)` fill in the best column of every row, unscaled by its norm."""
    dtype = tiles.scores.dtype
    for start in range(0, columns.shape[0], tiles.columns):
        block = columns[start : start + tiles.columns].to(dtype)
        part = None if allowed is None else allowed[start : start + tiles.columns]
        block, excluded = _normalized_block(block, part)
        count, ragged = len(block), _padded(len(block)) - len(block)
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
                better = value > best[chunk]
                index[chunk] = torch.where(better, at + start, index[chunk])
                best[chunk] = torch.where(better, value, best[chunk])


def match(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    reference_mask: Tensor | None,
    matching: str,
) -> tuple[Tensor, Tensor]:
    """See `negtome_fast.reference.match`."""
    dtype = compute_dtype(x.dtype)
    shape = (x.shape[0], pairing.slots, x.shape[1])
    similarity = torch.full(shape, NOTHING, dtype=dtype, device=x.device)
    index = torch.full(shape, -1, dtype=torch.int64, device=x.device)
    pairs = [
        (item, slot, pairing.reference_item(item, slot))
        for item in pairing.sources
        for slot in range(pairing.slots)
    ]
    by_columns: dict[int, list[tuple[int, int, int]]] = {}
    for pair in pairs:
        by_columns.setdefault(pair[2] if matching == "paper" else pair[0], []).append(pair)
    (tokens, channels), width = x.shape[1:], _padded(max(reference.shape[1], x.shape[1]))
    elements = tokens * channels + width * channels + tokens * width
    even = len({len(members) for members in by_columns.values()}) == 1
    if x.device.type == "cpu" and even and len(pairs) * elements <= SMALL:
        ordered = [pair for members in by_columns.values() for pair in members]
        items, slots, others = torch.tensor(ordered).unbind(1)
        found = _match_at_once(
            x, reference, list(by_columns), items, others, reference_mask, matching
        )
        similarity[items, slots], index[items, slots] = found
        return similarity, index

    tiles = _Tiles(x, reference)
    for shared, members in by_columns.items():
        columns = reference[shared] if matching == "paper" else x[shared]
        allowed = None
        if reference_mask is not None and matching == "paper":
            allowed = reference_mask[shared]
        searches = [
            (x[i] if matching == "paper" else reference[o], similarity[i, s], index[i, s])
            for i, s, o in members
        ]
        _search(columns, allowed, searches, tiles)

    for item, slot, other in pairs:
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


def _match_at_once(
    x: Tensor,
    reference: Tensor,
    shared: list[int],
    items: Tensor,
    others: Tensor,
    reference_mask: Tensor | None,
    matching: str,
) -> tuple[Tensor, Tensor]:
    """Similarity and index `(P, N)` of P pairs of items, as one batched product.

    As many pairs in a row have each of the `shared` items for their columns.
    """
    dtype, paper = compute_dtype(x.dtype), matching == "paper"
    columns = (reference if paper else x)[shared].to(dtype)
    rows = (x[items] if paper else reference[others]).to(dtype)
    row_norm = torch.linalg.vector_norm(rows, dim=-1)
    column_norm = torch.linalg.vector_norm(columns, dim=-1)
    usable = column_norm.isfinite()
    if reference_mask is not None and paper:
        usable = usable & reference_mask[shared]
    columns, ragged = columns / column_norm.clamp_min(EPSILON)[..., None], -columns.shape[1] % RUN
    if ragged:
        columns, usable = F.pad(columns, (0, 0, 0, ragged)), F.pad(usable, (0, ragged))
    if not bool(usable.all()):
        columns.masked_fill_(~usable[..., None], 0)
    scores = torch.bmm(rows.reshape(len(shared), -1, x.shape[2]), columns.mT)
    if not bool(usable.all()):
        scores.masked_fill_(~usable[:, None], NOTHING)
    value, index = _row_maximum(scores.flatten(0, 1))
    value, index = value.view(row_norm.shape), index.view(row_norm.shape)
    found = row_norm.isfinite() & (value > NOTHING)
    if not paper:
        found &= column_norm.isfinite().repeat_interleave(len(items) // len(shared), dim=0)
        found &= row_norm.isfinite().gather(1, index.clamp_max(row_norm.shape[1] - 1))
        if reference_mask is not None:
            found &= reference_mask[others]
    similarity = value / row_norm.clamp_min(EPSILON)
    return similarity.where(found, NOTHING), index.where(found, -1)


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
    pushed = (similarity > threshold[:, None]) & (index >= 0)
    if movable is not None:
        pushed &= movable[:, None]
    slots = torch.arange(pairing.slots, device=x.device)[:, None]
    if combine == "nearest" and pairing.slots > 1:
        similarity, best_slot = similarity.max(dim=1, keepdim=True)
        pushed &= slots == best_slot
    flat = torch.where(pushed, slots * tokens + index, -1)
    if combine == "nearest" and pairing.slots > 1:
        flat = flat.amax(dim=1, keepdim=True)

    if x.device.type == "cpu" and x.numel() <= SMALL:
        _push_at_once(x, reference, pairing, alpha, flat, out)
        return similarity, flat
    if out is not x:
        out.copy_(x)
    for item in pairing.sources:
        _push_item(x[item], reference, pairing, item, alpha, flat[item], out[item])
    return similarity, flat


def _push_at_once(
    x: Tensor, reference: Tensor, pairing: Pairing, alpha: Tensor, flat: Tensor, out: Tensor
) -> None:
    """Move the tokens of all items whose entries of `flat` `(B, S, N)` are not negative."""
    tokens = reference.shape[1]
    item, place = (flat >= 0).any(dim=1).nonzero().unbind(1)
    original = x[item, place].to(alpha.dtype)
    moved = original
    for number in flat[item, :, place].unbind(1):
        slot, token = number.clamp_min(0) // tokens, number.clamp_min(0) % tokens
        chosen = reference[pairing.reference_item(item, slot), token]
        step = (original - chosen.to(alpha.dtype)).mul_(alpha[slot][:, None])
        moved = torch.where((number >= 0)[:, None], step.add_(moved), moved)
    if out is not x:
        out.copy_(x)
    out[item, place] = moved.to(x.dtype)


def _push_item(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    item: int,
    alpha: Tensor,
    flat: Tensor,
    out: Tensor,
) -> None:
    """Move the tokens of one item, `(N, D)`, whose entries of `flat` `(S, N)` are not negative."""
    dtype, tokens = alpha.dtype, reference.shape[1]
    for first in range(0, x.shape[0], PUSH_ROWS):
        chunk = slice(first, first + PUSH_ROWS)
        moves = (flat[:, chunk] >= 0).any(dim=0)
        if x.device.type == "cpu":
            selected = moves.nonzero()[:, 0] + first
            if selected.numel() == 0:
                continue
        else:
            selected = torch.arange(first, min(first + PUSH_ROWS, x.shape[0]), device=x.device)
        original = x.index_select(0, selected).to(dtype)
        moved = original
        for number in flat[:, selected]:
            token = number.clamp_min(0)
            if pairing.slots == 1:
                strength = alpha
                chosen = reference[pairing.reference_item(item, 0)].index_select(0, token)
            else:
                slot = token // tokens
                strength = alpha[slot][:, None]
                chosen = reference[pairing.reference_item(item, slot), token % tokens]
            step = (original - chosen.to(dtype)).mul_(strength)
            moved = torch.where((number >= 0)[:, None], step.add_(moved), moved)
        if x.device.type == "cpu":
            out.index_copy_(0, selected, moved.to(x.dtype))
        else:
            out[chunk] = torch.where(moves[:, None], moved.to(x.dtype), x[chunk])
