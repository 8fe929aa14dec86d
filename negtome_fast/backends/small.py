"""Small problems of the torch backend: all pairs of items are matched, and pushed, at once.

Their calls cost more than their arithmetic.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.pairing import Pairing
from ..reference import NOTHING, compute_dtype
from .coarse import EPSILON, RUN, padded

#: Elements up to which all pairs of items are matched, or all items pushed, at once: for small
#: problems the calls cost more than the arithmetic.
SMALL = 4 * 2**20
#: Elements up to which all tokens are pushed and those that stay are put back.
TINY = 2**20


class Pairs(NamedTuple):
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
def pairs_of(pairing: Pairing, matching: str) -> Pairs:
    by_columns: dict[int, list[tuple[int, int, int]]] = {}
    for item in pairing.sources:
        for slot in range(pairing.slots):
            pair = (item, slot, pairing.reference_item(item, slot))
            by_columns.setdefault(pair[2] if matching == "paper" else item, []).append(pair)
    even = len({len(members) for members in by_columns.values()}) == 1
    flat = [pair for members in by_columns.values() for pair in members]
    with torch.inference_mode(False):
        parts = torch.tensor(flat, dtype=torch.int64, device="cpu").reshape(-1, 3).unbind(1)
    return Pairs(by_columns, even, *parts)


@lru_cache(maxsize=64)
def _reference_items(pairing: Pairing) -> Tensor:
    """Reference item of every item and slot, `(B, slots)`; also of items that do not move."""
    rows = [
        [pairing.reference_item(item, slot) for slot in range(pairing.slots)]
        for item in range(pairing.items)
    ]
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _all_finite(norms: Tensor) -> bool:
    """Whether all norms are; a NaN is the maximum of whatever it is among."""
    return norms.numel() == 0 or math.isfinite(float(norms.amax()))


def row_maximum(scores: Tensor) -> tuple[Tensor, Tensor]:
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


def fits_at_once(x: Tensor, reference: Tensor, pairs: Pairs) -> bool:
    (tokens, channels), width = x.shape[1:], padded(max(reference.shape[1], x.shape[1]))
    elements = tokens * channels + width * channels + tokens * width
    return x.device.type == "cpu" and pairs.even and len(pairs.items) * elements <= SMALL


def match_at_once(
    x: Tensor,
    reference: Tensor,
    pairs: Pairs,
    reference_mask: Tensor | None,
    matching: str,
) -> tuple[Tensor, Tensor]:
    """Similarity and index `(P, N)` of P pairs of items, as one batched product."""
    dtype, paper, shared = compute_dtype(x.dtype), matching == "paper", list(pairs.by_columns)
    rows, columns = (x, reference) if paper else (reference, x)
    which = pairs.items if paper else pairs.others
    row_norm = torch.linalg.vector_norm(rows, dim=-1, dtype=dtype)
    column_norm = (
        row_norm if x is reference else torch.linalg.vector_norm(columns, dim=-1, dtype=dtype)
    )
    rows, row_norm = rows[which].to(dtype), row_norm[which]
    columns, column_norm = columns[shared].to(dtype), column_norm[shared]
    allowed = reference_mask[shared] if reference_mask is not None and paper else None
    gates = reference_mask[pairs.others] if reference_mask is not None and not paper else None
    excluded = None
    if allowed is not None or not _all_finite(column_norm):
        usable = column_norm.isfinite()
        excluded = ~(usable if allowed is None else usable & allowed)
    columns, ragged = columns / column_norm.clamp_min(EPSILON)[..., None], -columns.shape[1] % RUN
    if excluded is not None:
        columns.masked_fill_(excluded[..., None], 0)
    if ragged:
        columns = F.pad(columns, (0, 0, 0, ragged))
    scores = torch.bmm(rows.reshape(len(shared), -1, x.shape[2]), columns.mT)
    if ragged:
        scores[..., -ragged:] = NOTHING
    if excluded is not None:
        scores[..., : excluded.shape[1]].masked_fill_(excluded[:, None], NOTHING)
    value, index = row_maximum(scores.flatten(0, 1))
    value, index = value.view(row_norm.shape), index.view(row_norm.shape)
    similarity = value / row_norm.clamp_min(EPSILON)
    if excluded is None and gates is None and _all_finite(row_norm):
        return similarity, index
    found = row_norm.isfinite() & (value > NOTHING)
    if not paper:
        found &= column_norm.isfinite().repeat_interleave(len(pairs.items) // len(shared), dim=0)
        found &= row_norm.isfinite().gather(1, index.clamp_max(row_norm.shape[1] - 1))
        if gates is not None:
            found &= gates
    return similarity.where(found, NOTHING), index.where(found, -1)


def push_at_once(
    x: Tensor, reference: Tensor, pairing: Pairing, alpha: Tensor, flat: Tensor, out: Tensor
) -> None:
    """Move the tokens of all items whose entries of `flat` `(B, S, N)` are not negative."""
    tokens = reference.shape[1]
    if flat.shape[1] == 1 and x.numel() <= TINY:
        number = flat[:, 0]
        token = number.clamp_min(0)
        item = _reference_items(pairing)
        if pairing.slots > 1:
            slot, token = token // tokens, token % tokens
            strength, item = alpha[slot][..., None], item.gather(1, slot)
        else:
            strength = alpha
        original = x.to(alpha.dtype)
        step = (original - reference[item, token].to(alpha.dtype)).mul_(strength)
        moved = step.add_(original).to(x.dtype)
        torch.where((number >= 0)[..., None], moved, x, out=out)
        return
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
