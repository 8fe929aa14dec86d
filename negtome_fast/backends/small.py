"""Few tokens on a CPU, for the torch backend: each call of torch costs more than its arithmetic.

So calls are few. One product matches all items, and one gather without a mask pushes all tokens:

    y_i = x_i - alpha * (t_i - x_i)   where   t_i = r_j* if token i is pushed, else x_i

A token that stays gets a step of +0, which changes no bit of it. For `others`, the product of two
items serves both of them: its rows are the cosines of one, its columns those of the other.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call
from ..naive import NOTHING, compute_dtype
from ..pairing import Pairing
from . import equal
from .pieces import EPSILON, RUN, padded
from .small_places import Places, places_of

#: A call is small if tokens and scores of all pairs have no more elements than this.
SMALL = 4 * 2**20
#: If the sum of norms is less than this, no difference of two tokens overflows.
LARGEST = {dtype: torch.finfo(dtype).max / 4 for dtype in (torch.float32, torch.float64)}
#: A larger alpha, of either sign, could push a token beyond the range even of bf16, fp32 and fp64:
#: the norms of matched tokens are at most the root of that range. Such a call is not small.
STRONGEST = 1e12
#: The dtype that any push can leave, and its largest number.
NARROW, LIMIT = torch.float16, torch.finfo(torch.float16).max
#: Up to this many columns, the unvectorised maximum with index beats a search run by run.
DIRECT = 2 * RUN


class _Tokens(NamedTuple):
    """Tokens `(B, N, D)`, upcast and contiguous, and their norms `(B, N, 1)`, at least `EPSILON`.

    `finite`: no difference of two of them overflows, and none is NaN.
    """

    wide: Tensor
    norm: Tensor
    finite: bool


def fits(call: Call) -> bool:
    """Return True if a call is small, not empty, and of an alpha up to `STRONGEST`."""
    x = call.x
    if not x.is_cpu or not 0 < elements(x.shape, call.reference.shape[1], call.pairing) <= SMALL:
        return False
    alpha = None if call.alpha is None else call.alpha.tolist()
    return all(abs(a) <= STRONGEST for a in (alpha if isinstance(alpha, list) else [alpha or 0.0]))


def elements(shape: torch.Size, length: int, pairing: Pairing) -> int:
    """Number of elements of all products: tokens of `shape`, references of `length`, scores."""
    (items, tokens, channels), width = shape, padded(max(length, shape[1]))
    pairs = items - pairing.groups if pairing.mode == "first" else items * pairing.slots
    if pairing.mode == "others":
        pairs //= 2  # one product serves both items
    return pairs * (tokens * channels + width * channels + tokens * width)


def _read(tokens: Tensor) -> _Tokens:
    dtype = compute_dtype(tokens.dtype)
    wide = tokens if tokens.dtype == dtype else tokens.to(dtype)
    wide = wide if wide.is_contiguous() else wide.contiguous()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min_(EPSILON)
    # The sum bounds every element, and NaN is not less than anything.
    return _Tokens(wide, norm, float(norm.sum()) < LARGEST[dtype])


def _maximum(scores: Tensor, keepdim: bool) -> tuple[Tensor, Tensor]:
    """Maximum of each row `(..., C)` of a contiguous tensor, and its lowest index.

    A maximum without index is vectorised, one with index is not; so with many columns the index is
    searched for only in the run that holds the maximum.
    """
    columns = scores.shape[-1]
    if columns <= DIRECT or columns % RUN:
        return scores.max(dim=-1, keepdim=keepdim)
    count = columns // RUN
    runs = scores.view(-1, RUN)
    run = runs.amax(dim=1).view(-1, count).max(dim=1).indices
    place = torch.arange(0, len(runs), count, device="cpu").add_(run)
    value, offset = runs.index_select(0, place).max(dim=1)
    shape = (*scores.shape[:-1], 1) if keepdim else scores.shape[:-1]
    return value.view(shape), offset.add_(run, alpha=RUN).view(shape)


def _best(
    rows: Tensor, columns: Tensor, items: int, excluded: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Best unit column `(C, K * M, D)` of each of K items for the rows `(C, R, D)`.

    Columns are padded to whole runs: a matrix library rounds those at the ragged end of a product
    in another way, which would decide between equal tokens.

    Returns:
        Score and index `(C, R, K)`.
    """
    sets, count, channels = rows.shape
    length = columns.shape[1] // items
    ragged = -length % RUN
    if ragged:
        columns = F.pad(columns.reshape(-1, length, channels), (0, 0, 0, ragged))
        columns = columns.view(sets, -1, channels)
    scores = torch.bmm(rows, columns.mT)
    if items > 1:
        scores = scores.view(sets, count, items, length + ragged)
    if ragged:
        scores[..., length:] = NOTHING
    if excluded is not None:
        excluded = excluded.view(sets, 1, *scores.shape[2:-1], length)
        scores[..., :length].masked_fill_(excluded, NOTHING)
    return _maximum(scores, keepdim=items == 1)


def _one_way(sources: _Tokens, references: _Tokens, call: Call) -> tuple[Tensor, Tensor]:
    """Cosine and index `(P, S, N)` of "first" and of external references."""
    pairing, mask, paper = call.pairing, call.reference_mask, call.matching == "paper"
    items, tokens, channels = sources.wide.shape
    sets = pairing.groups if pairing.mode == "first" else items if pairing.per_item else 1
    source, source_norm = sources.wide.view(sets, -1, channels), sources.norm.view(sets, -1, 1)
    allowed = None if mask is None or not paper else mask.reshape(sets, -1)
    if pairing.mode == "first":
        parts = [tokens, source.shape[1] - tokens]
        target, source = source.split_with_sizes(parts, 1)
        target_norm, source_norm = source_norm.split_with_sizes(parts, 1)
        allowed = None if allowed is None else allowed[:, :tokens]
    else:
        target, target_norm = references.wide.view(sets, -1, channels), references.norm
        target_norm = target_norm.view(sets, -1, 1)
    # Official matching is paper matching with the roles exchanged.
    rows, row_norm = (source, source_norm) if paper else (target, target_norm)
    columns, norm = (target, target_norm) if paper else (source, source_norm)
    count = pairing.slots if paper else source.shape[1] // tokens
    excluded = _excluded(norm, sources.finite and references.finite, allowed)
    value, index = _best(rows, columns / norm, count, excluded)
    similarity = value.div_(row_norm)
    if count == 1 and (paper or pairing.slots == 1):
        return similarity.view(-1, 1, tokens), index.view(-1, 1, tokens)
    if paper:
        similarity, index = (part.view(-1, tokens, count) for part in (similarity, index))
        return similarity.mT, index.mT
    shape = (sets, pairing.slots, tokens, count)
    found = (part.view(shape).permute(0, 3, 1, 2) for part in (similarity, index))
    similarity, index = (part.reshape(-1, pairing.slots, tokens) for part in found)
    return similarity, index


def _excluded(norm: Tensor, finite: bool, allowed: Tensor | None) -> Tensor | None:
    """Mask of columns that may not be chosen, of the shape of `allowed`; None if all may."""
    if finite:
        return None if allowed is None else ~allowed
    usable = norm.isfinite().squeeze(-1)
    return ~usable if allowed is None else ~(usable & allowed)


def _both_ways(
    sources: _Tokens, places: Places, slots: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cosine and index `(B, S, N)` of "others".

    One product serves two items: by the maximum of its rows, and by that of its columns.
    """
    items, tokens, _ = sources.wide.shape
    unit = sources.wide / sources.norm
    if tokens % RUN:
        unit = F.pad(unit, (0, 0, 0, -tokens % RUN))
    one, other = unit.index_select(0, places.one), unit.index_select(0, places.other)
    across = down = torch.bmm(one, other.mT)[:, :tokens, :tokens]
    excluded = _excluded(sources.norm, sources.finite, mask)
    if excluded is not None:
        across = across.masked_fill(excluded[places.other][:, None], NOTHING)
        down = down.masked_fill(excluded[places.one][..., None], NOTHING)
    if across.is_contiguous():
        values, indices = _maximum(across, keepdim=False)
    else:
        values, indices = across.max(dim=2)
    down_values, down_indices = down.max(dim=1)
    assert places.order is not None
    value = torch.cat((values, down_values)).index_select(0, places.order)
    index = torch.cat((indices, down_indices)).index_select(0, places.order)
    return value.view(items, slots, tokens), index.view(items, slots, tokens)


def _match(
    sources: _Tokens, references: _Tokens, call: Call, places: Places
) -> tuple[Tensor, Tensor]:
    """Cosine and index `(P, S, N)` of the items that move; -inf and -1 where nothing matches."""
    pairing, mask, paper = call.pairing, call.reference_mask, call.matching == "paper"
    if pairing.mode == "others":
        candidates = mask if paper else None
        similarity, index = _both_ways(sources, places, pairing.slots, candidates)
    else:
        similarity, index = _one_way(sources, references, call)
    if not paper:
        index = equal.settle_sources(call, index)
    if sources.finite and references.finite and mask is None:
        return _settled(call, similarity, index)
    found = similarity > NOTHING
    usable = sources.norm.isfinite().squeeze(-1)
    found &= usable.index_select(0, places.moving)[:, None]
    if not paper:
        good = references.norm.isfinite().squeeze(-1)[places.items]
        found &= good & good.gather(2, index.clamp(0, good.shape[2] - 1))
        if mask is not None:
            found &= mask[places.items]
    return _settled(call, similarity.where(found, NOTHING), index.where(found, -1))


def _settled(call: Call, similarity: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Results `(P, S, N)` in which equal tokens tie."""
    if call.matching == "paper":
        return equal.settle(call, similarity, index)
    return equal.settle_slots(call, similarity), index


def _with_those_that_stay(values: Tensor, pairing: Pairing, fill: Tensor) -> Tensor:
    """Extend results `(P, S, N)` of items that move to all items, `(B, S, N)`, using `fill`."""
    if pairing.mode != "first":
        return values.contiguous()
    if pairing.groups == 1:
        return torch.cat((fill, values))
    shape = (pairing.groups, -1, values.shape[2])
    return torch.cat((fill, values.view(shape)), dim=1).view(pairing.items, 1, -1)


def match(call: Call) -> tuple[Tensor, Tensor]:
    """See `negtome_fast.naive.match`."""
    x, reference, pairing = call.x, call.reference, call.pairing
    sources = _read(x)
    references = _read(reference) if pairing.mode == "external" else sources
    places = places_of(pairing, call.matching, x.shape[1], reference.shape[1])
    found = _match(sources, references, call, places)
    similarity = _with_those_that_stay(found[0], pairing, places.nothing.to(found[0].dtype))
    return similarity, _with_those_that_stay(found[1], pairing, places.stays)


def guide(call: Call, out: Tensor) -> tuple[Tensor, Tensor]:
    """See `negtome_fast.naive.guide`."""
    x, reference, pairing, alpha = call.x, call.reference, call.pairing, call.alpha
    plain = pairing.mode == "first" and pairing.groups == 1 and call.reference_mask is None
    if plain and call.matching == "paper" and alpha.numel() == call.threshold.numel() == 1:
        done = guide_from_first(x, alpha, call.threshold, call.source_mask, out)
        if done is not None:
            return done
    sources = _read(x)
    references = _read(reference) if pairing.mode == "external" else sources
    places = places_of(pairing, call.matching, x.shape[1], reference.shape[1])
    found = _match(sources, references, call, places)

    finite = sources.finite and references.finite
    similarity, choice = _choose(found, call, places)
    pushed = choice.pushed
    if call.source_mask is not None:
        pushed &= _moving(call.source_mask, pairing).reshape(-1, 1, x.shape[1])
    number = torch.where(pushed, choice.number, places.none)
    table = references.wide.view(-1, x.shape[2])
    own = None if pairing.mode == "external" else places.own
    _push(x, sources.wide, table, choice, own, pairing, finite, out)
    return (
        _with_those_that_stay(similarity, pairing, places.nothing.to(sources.wide.dtype)),
        _with_those_that_stay(number, pairing, places.stays),
    )


class _Flat(NamedTuple):
    """Constants of `guide_from_first`, for tokens `(N,)` of item 0 and `(K,)` after it.

    Attributes:
        sizes: N and K.
        own: int64 `(K,)`, the rows of the tokens that move among all tokens.
        nothing, stays: fp32 and int64 `(N,)`, -inf and -1, the results of item 0.
        none: -1, `()`.
    """

    sizes: list[int]
    own: Tensor
    nothing: Tensor
    stays: Tensor
    none: Tensor


@lru_cache(maxsize=64)
def _flat(items: int, tokens: int) -> _Flat:
    with torch.inference_mode(False):
        return _Flat(
            [tokens, (items - 1) * tokens],
            torch.arange(tokens, items * tokens, device="cpu"),
            torch.full((tokens,), NOTHING, dtype=torch.float32, device="cpu"),
            torch.full((tokens,), -1, dtype=torch.int64, device="cpu"),
            torch.tensor(-1, dtype=torch.int64, device="cpu"),
        )


def guide_from_first(
    x: Tensor, alpha: Tensor, threshold: Tensor, source_mask: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor] | None:
    """`guide` for one group and "first", without a mask; None if a token or the push is too large.

    This is the most common call, so it is written out: half of its time goes into views and Python.
    """
    strength = alpha.item()
    items, tokens, channels = x.shape
    flat = _flat(items, tokens)
    dtype = compute_dtype(x.dtype)
    own_copy = x.dtype != dtype or not x.is_contiguous()
    wide = (x.to(dtype).contiguous() if own_copy else x).view(-1, channels)
    norm = torch.linalg.vector_norm(wide, dim=1).clamp_min_(EPSILON)
    if not norm.sum().item() < LARGEST[dtype] or abs(strength) > STRONGEST:
        return None
    target, source = wide.split_with_sizes(flat.sizes)
    target_norm, source_norm = norm.split_with_sizes(flat.sizes)
    ragged = -tokens % RUN
    scores = torch.mm(source, (F.pad(target, (0, 0, 0, ragged)) if ragged else target).t())
    scores = (scores[:, :tokens] if ragged else scores).div_(target_norm)
    value, index = _maximum(scores, False) if tokens > DIRECT and not ragged else scores.max(1)
    if not equal.differ(target):
        index = equal.lowest(target)[index]
    similarity = value.div_(source_norm)
    pushed = similarity > threshold
    if source_mask is not None:
        pushed &= source_mask.reshape(-1)[tokens:]

    step = wide.index_select(0, index.where(pushed, flat.own))
    if strength < 0:
        step = torch.sub(source, step, out=step).mul_(-alpha)
    else:
        step = step.sub_(source).mul_(alpha)
    if out is not x:
        out[0].copy_(x[0])
    if own_copy or out is x:
        source.sub_(step)
    if x.dtype == NARROW:
        source.clamp_(-LIMIT, LIMIT)
    if own_copy:
        out[1:].copy_(source.view(items - 1, tokens, channels))
    elif out is not x:
        moved = out[1:]
        torch.sub(source.view(moved.shape), step.view(moved.shape), out=moved)
    nothing = flat.nothing if dtype == torch.float32 else flat.nothing.to(dtype)
    similarity = torch.cat((nothing, similarity)).view(items, 1, tokens)
    return similarity, torch.cat((flat.stays, index.where(pushed, flat.none))).view(
        items, 1, tokens
    )


class _Choice(NamedTuple):
    """The match of each token, `(P, 1, N)`, or of each token and slot, `(P, S, N)`.

    Attributes:
        pushed: bool, True if the match exceeds the threshold.
        number: int64, index of the match among the reference tokens that its item meets.
        row: int64, row of the match among all reference tokens.
        alpha: `()`, or a value for each match.
    """

    pushed: Tensor
    number: Tensor
    row: Tensor
    alpha: Tensor


def _choose(found: tuple[Tensor, Tensor], call: Call, places: Places) -> tuple[Tensor, _Choice]:
    """The cosine of each token's match, and the reference token that it is pushed from."""
    (similarity, index), starts, slot = found, places.starts, None
    dtype, numbers = similarity.dtype, (call.alpha, call.threshold)
    alpha, threshold = (value if value.dtype == dtype else value.to(dtype) for value in numbers)
    number, several = index, call.pairing.slots > 1
    if several and call.combine == "nearest":
        similarity, slot = similarity.max(dim=1, keepdim=True)
        index = index.gather(1, slot)
        number = torch.add(index, slot, alpha=places.length)
        starts = None if starts is None else starts.gather(1, slot)
    elif several:
        number = index + places.offsets
    pushed = similarity > _by_slot(threshold, slot)
    row = number if starts is None else index + starts
    return similarity, _Choice(pushed, number, row, _by_slot(alpha, slot))


def _by_slot(parameter: Tensor, slot: Tensor | None) -> Tensor:
    """`()` if one number serves all, else by each token's slot: `(P, 1, N)` or `(S, 1)`."""
    if parameter.numel() == 1:
        return parameter if parameter.ndim == 0 else parameter.reshape(())
    return parameter[:, None] if slot is None else parameter[slot]


def _moving(values: Tensor, pairing: Pairing) -> Tensor:
    """A view of the items that move: `(P, ...)`, or `(G, P / G, ...)` of several groups."""
    if pairing.mode != "first":
        return values
    if pairing.groups == 1:
        return values.narrow(0, 1, pairing.items - 1)
    return values.view(pairing.groups, pairing.group_size, *values.shape[1:])[:, 1:]


def _push(
    x: Tensor,
    wide: Tensor,
    table: Tensor,
    choice: _Choice,
    own: Tensor | None,
    pairing: Pairing,
    finite: bool,
    out: Tensor,
) -> None:
    """Write all tokens to `out`.

    Args:
        table: all reference tokens, `(K, D)`.
        own: the row of each token in the table, `(P, 1, N)`; None if it is not in there.
    """
    source, target = _moving(wide, pairing), _moving(out, pairing)
    alpha, pushed, slots = choice.alpha, choice.pushed, choice.pushed.shape[1]
    simple = own is not None and alpha.ndim == 0
    row = choice.row.where(pushed, own if simple and own is not None else 0)
    chosen = table.index_select(0, row.reshape(-1))
    if slots == 1:
        chosen = chosen.view(source.shape)
    else:
        chosen, source = chosen.view(*row.shape, -1), source[:, None]
    if not simple:
        weight = (pushed * alpha).view(*chosen.shape[:-1], 1)
        step = chosen.sub_(source)
        if not finite:
            step.masked_fill_(~pushed.view(weight.shape), 0)
        step.mul_(weight)
    elif float(alpha) < 0:
        step = torch.sub(source, chosen, out=chosen).mul_(-alpha)
    else:
        step = chosen.sub_(source).mul_(alpha)
    if slots > 1:
        step, source = step.sum(dim=1), source[:, 0]
    if not simple:
        step.add_(0.0)  # The step of a token that stays must not be -0.

    if out is not x and pairing.mode == "first":
        out[:: pairing.group_size].copy_(x[:: pairing.group_size])
    if finite and x.dtype != NARROW:
        torch.sub(source, step, out=target)
        return
    moved = torch.sub(source, step, out=step)
    if x.dtype == NARROW:
        moved.clamp_(-LIMIT, LIMIT)
    if finite:
        target.copy_(moved)
        return
    moves = pushed.any(dim=1).view(*source.shape[:-1], 1)
    torch.where(moves, moved.to(x.dtype), _moving(x, pairing), out=target)
