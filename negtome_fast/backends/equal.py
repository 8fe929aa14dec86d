"""Equal tokens tie: a match moves to the lowest token that equals it, however it was scored.

A matrix library may round equal columns otherwise by their place in a product, by the product's
shape, or by its number of threads; and one reference may be scored by a product, another by pairs.
No comparison of such scores can tell which of several equal tokens comes first. So they are found
by their bits: integer sums of bits depend on no order, and tokens of equal sums are compared.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call
from ..naive import NOTHING
from .pieces import piece_rows, slices
from .workers import ALONE, Team

#: On a CPU, the first 64 bits of the tokens show in nearly all calls that none are equal. Tokens
#: that share them are told apart by a sample of at least this many channels, and then by all.
SAMPLED = 8
#: Up to this many tokens, Python counts distinct keys faster than torch sorts them.
COUNTED = 256
#: Other sums are tried, as often as this, if two tokens that differ have the same.
ATTEMPTS = 4
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Equals(NamedTuple):
    """For each of the K tokens of a set, an equal token that may be matched, `(sets, K)` each.

    Attributes:
        within: the lowest in the same reference item.
        first: the lowest of the set.
        second: the lowest that is in another item than `first`; `first` if there is none.
    """

    within: Tensor
    first: Tensor
    second: Tensor


def _bits(tokens: Tensor) -> Tensor:
    return tokens.view(_INTEGERS[tokens.element_size()])


def _same(one: Tensor, other: Tensor) -> Tensor:
    """Return True, `(K,)`, for each pair of tokens `(K, D)` of equal bits."""
    return (_bits(one) == _bits(other)).all(dim=1)


@lru_cache(maxsize=64)
def _weights(channels: int, device: torch.device, attempt: int) -> Tensor:
    """Odd int64 numbers `(D,)` by which sums of bits tell tokens apart."""
    generator = torch.Generator("cpu").manual_seed(channels + attempt)
    with torch.inference_mode(False):
        numbers = torch.randint(-(2**62), 2**62, (channels,), generator=generator, device="cpu")
        return numbers.mul_(2).add_(1).to(device)


def _keys(tokens: Tensor, attempt: int = 0) -> Tensor:
    """Sums of bits `(...)` of tokens `(..., D)`: equal tokens have equal keys."""
    bits = _bits(tokens)
    if tokens.element_size() == 8:
        bits = bits ^ (bits >> 32)
    terms = bits * _weights(tokens.shape[-1], tokens.device, attempt)
    # A sign is a high bit, and two of them would cancel.
    return (terms ^ (terms >> 31)).sum(dim=-1)


def _sample_keys(tokens: Tensor) -> Tensor:
    return _keys(tokens[..., :: max(1, tokens.shape[-1] // SAMPLED)])


def _distinct(keys: Tensor) -> bool:
    """Return True if no two keys of a line `(lines, K)` are equal."""
    if keys.shape[1] <= COUNTED:
        return all(len(set(line)) == len(line) for line in keys.tolist())
    ordered = keys.sort(dim=1).values
    return not bool((ordered[:, 1:] == ordered[:, :-1]).any())


def _first_bits(tokens: Tensor) -> Tensor | None:
    """The first 64 bits `(...)` of tokens `(..., D)`; None if memory has them elsewhere."""
    ratio = 8 // tokens.element_size()
    *steps, step = tokens.stride()
    places = tokens.shape[-1], tokens.storage_offset(), *steps
    if step != 1 or any(place % ratio for place in places):
        return None
    return tokens.view(torch.int64)[..., 0]


def differ(tokens: Tensor, sets: int = 1) -> bool:
    """Return True if tokens `(..., D)` on a CPU, in equal sets, are soon seen to differ."""
    bits = _first_bits(tokens)
    if bits is not None and _distinct(bits.reshape(sets, -1)):
        return True
    return _distinct(_sample_keys(tokens).view(sets, -1))


def lowest(tokens: Tensor, team: Team = ALONE) -> Tensor:
    """Return the index `(K,)` of the first token of `(K, D)` that equals each of them."""
    return _find(tokens[None], None, 1, team).first[0]


def _full_keys(tokens: Tensor, sample: Tensor, team: Team, attempt: int) -> Tensor:
    """Keys `(sets, K)` of all channels; on a CPU only of tokens whose `sample` another one has."""
    length, channels = tokens.shape[1:]
    if not tokens.is_cpu:
        return _keys(tokens, attempt).view(sample.shape)
    ordered, order = sample.sort(dim=1)
    same = ordered[:, 1:] == ordered[:, :-1]
    shared = torch.zeros_like(ordered, dtype=torch.bool)
    shared[:, 1:] |= same
    shared[:, :-1] |= same
    numbers = torch.zeros_like(shared).scatter_(1, order, shared).view(-1).nonzero()[:, 0]
    found = torch.empty_like(numbers)
    parts = slices(len(numbers), piece_rows(2 * channels))

    def add_up(_: int, number: int) -> None:
        some = numbers[parts[number]]
        found[parts[number]] = _keys(tokens[some // length, some % length], attempt)

    team.each(len(parts), add_up)
    keys = sample.clone()
    keys.view(-1)[numbers] = found
    return keys


def _group(keys: Tensor, length: int) -> _Equals:
    """Group tokens of equal keys `(sets, K)`, where each item has `length` tokens."""
    count = keys.shape[1]
    ordered, order = keys.sort(dim=1, stable=True)
    place = torch.arange(count, device=keys.device).expand_as(order)
    item = order // length
    # `new` begins a group, `fresh` an item in it. Within a group, tokens ascend.
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    fresh = new.clone()
    fresh[:, 1:] |= item[:, 1:] != item[:, :-1]
    start = place.where(new, 0).cummax(dim=1).values
    run = place.where(fresh, 0).cummax(dim=1).values
    later = place.where(fresh & ~new, count - 1).flip(1).cummin(dim=1).values.flip(1)
    following = later.gather(1, start)
    there = (fresh & ~new).gather(1, following) & (start.gather(1, following) == start)
    following = following.where(there, start)

    def by_token(position: Tensor) -> Tensor:
        return torch.empty_like(order).scatter_(1, order, order.gather(1, position))

    return _Equals(by_token(run), by_token(start), by_token(following))


def _find(tokens: Tensor, allowed: Tensor | None, sets: int, team: Team) -> _Equals:
    """Find equal tokens among `(items, M, D)`, whose items form equal sets."""
    sample = _sample_keys(tokens).view(sets, -1)
    own = torch.arange(sample.shape[1], device=sample.device)
    for attempt in range(ATTEMPTS if tokens.is_cpu else 1):
        keys = _full_keys(tokens, sample, team, attempt)
        if allowed is not None:
            keys = torch.where(allowed.reshape(keys.shape), keys, -1 - own)
        equals = _group(keys, tokens.shape[1])
        member = _is_equal(tokens, equals.first, own, team)
        if tokens.is_cpu and bool(member.all()):
            return equals
    return _Equals(*(t.where(member & member.gather(1, t), own) for t in equals))


def _is_equal(tokens: Tensor, first: Tensor, own: Tensor, team: Team) -> Tensor:
    """Return True, `(sets, K)`, for each token that equals the one that `first` names."""
    length, count = tokens.shape[1], first.shape[1]
    line = torch.arange(len(first), device=first.device)[:, None] * count
    one, other = (line + own).view(-1), (line + first).view(-1)
    equal = torch.ones_like(one, dtype=torch.bool)
    which = (one != other).nonzero()[:, 0] if tokens.is_cpu else one
    parts = slices(len(which), piece_rows(2 * tokens.shape[2]))

    def compare(_: int, number: int) -> None:
        here = which[parts[number]]
        a, b = one[here], other[here]
        equal[here] = _same(tokens[a // length, a % length], tokens[b // length, b % length])

    team.each(len(parts), compare)
    return equal.view(first.shape)


def _look_up(table: Tensor, numbers: Tensor) -> Tensor:
    """Entries of `table` `(sets, K)` for numbers `(sets, ...)`."""
    return table.gather(1, numbers.reshape(len(table), -1)).view(numbers.shape)


def settle(
    call: Call, similarity: Tensor, index: Tensor, team: Team = ALONE
) -> tuple[Tensor, Tensor]:
    """Move matches of paper matching to the lowest equal tokens that may be matched.

    Afterwards the first maximum over the slots belongs to the lowest slot that has such a token.

    Args:
        call: its items need not all be in the results: of "first", those that move are enough.
        similarity, index: `(P, S, N)`, as `negtome_fast.naive.match` returns them.
        team: the threads of the call.
    """
    tokens, mask, pairing = call.reference, call.reference_mask, call.pairing
    if pairing.mode == "first":
        tokens = tokens[:: pairing.group_size]
        mask = None if mask is None else mask[:: pairing.group_size]
    sets = pairing.items if pairing.per_item else 1
    sets = sets if pairing.mode == "external" else pairing.groups
    if not index.numel() or (tokens.is_cpu and differ(tokens, sets)):
        return similarity, index
    equals, length = _find(tokens, mask, sets, team), tokens.shape[1]
    _, slots, count = index.shape
    shape = (sets, -1, slots, count)
    similarity, index = similarity.reshape(shape), index.reshape(shape)
    item = torch.arange(slots, device=index.device)[:, None]
    position = torch.arange(index.shape[1], device=index.device)[:, None, None]
    if pairing.mode == "others":
        item = item + (item >= position)
    flat = _look_up(equals.within, index.clamp_min(0) + item * length)
    index = index.where(index < 0, flat - item * length)
    if slots > 1:
        value, slot = similarity.max(dim=2, keepdim=True)
        best = flat.gather(2, slot)
        target = _look_up(equals.first, best)
        if pairing.mode == "others":
            target = target.where(target // length != position, _look_up(equals.second, best))
        to = target // length
        if pairing.mode == "others":
            to = to - (to > position).long()
        to = to.where(value > NOTHING, slot)
        at = (target % length).where(value > NOTHING, index.gather(2, slot))
        similarity, index = similarity.scatter(2, to, value), index.scatter(2, to, at)
    return similarity.view(-1, slots, count), index.view(-1, slots, count)


def settle_sources(call: Call, index: Tensor, team: Team = ALONE) -> Tensor:
    """Move matches `(P, S, N)` of official matching to the lowest equal source tokens."""
    x, pairing = call.x, call.pairing
    if not index.numel() or (x.is_cpu and differ(x, len(x))):
        return index
    table = _find(x, None, len(x), team).first
    if len(index) != len(x):
        table = table.view(pairing.groups, -1, x.shape[1])[:, 1:].flatten(0, 1)
    return index.where(index < 0, _look_up(table, index.clamp_min(0)))


def settle_slots(call: Call, similarity: Tensor, team: Team = ALONE) -> Tensor:
    """Give slots whose reference tokens are equal the largest of their similarities `(B, S, N)`.

    With official matching, the reference tokens are the rows that are compared.
    """
    pairing, reference = call.pairing, call.reference
    if pairing.slots == 1 or not similarity.numel():
        return similarity
    value, best = similarity.max(dim=1)
    keys, line = _sample_keys(reference), torch.arange(reference.shape[1], device=reference.device)
    similarity = similarity.clone()
    for item in pairing.sources:
        others = [pairing.reference_item(item, slot) for slot in range(pairing.slots)]
        at = torch.tensor(others, device="cpu").to(best.device)[best[item]]
        for slot, other in enumerate(others):
            near = (keys[other] == keys[at, line]) & (similarity[item, slot] > NOTHING)
            near &= slot < best[item]
            if not reference.is_cpu:
                near &= _same(reference[other], reference[at, line])
            elif len(rows := near.nonzero()[:, 0]):
                near[rows] = _same(reference[other, rows], reference[at[rows], rows])
            similarity[item, slot] = value[item].where(near, similarity[item, slot])
    return similarity
