"""The fuzzer's oracle: the semantics in fp64, written apart from the package, aware of ties.

A result may choose any token whose cosine is within the rounding of a dot product of the best; but
of tokens with equal bits only the lowest that may be matched.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from helpers.fuzz_problems import Fuzzed

#: Results saturate at the largest finite number of their dtype. While False, numbers beyond it are
#: not compared.
SATURATES = True
NOTHING = -float("inf")


class Decision(NamedTuple):
    """The decision for the tokens of an item: similarity, slot and token `(N,)`.

    `moved` is True where slot and token mean something.
    """

    similarity: Tensor
    moved: Tensor
    slot: Tensor
    token: Tensor


class Scores(NamedTuple):
    """Cosines of an item's N tokens with K candidates in each of S slots.

    Attributes:
        cosine: fp64 `(S, N, K)`, -inf where there is no candidate.
        valid: bool `(S, N, K)`, False where the candidate, if it is the best, leaves no match.
        lowest: bool `(S, K)`, False where an equal candidate comes first.
        above: bool `(S, S, N)`, True at (s, t, n) where slot t < s compares equal rows for token n.
    """

    cosine: Tensor
    valid: Tensor
    lowest: Tensor
    above: Tensor


def _check(good: Tensor, what: str) -> None:
    if not bool(good.all()):
        raise AssertionError(f"{what}: {int((~good).sum())} of {good.numel()}")


def _integers(tokens: Tensor) -> Tensor:
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tokens.element_size()]
    return tokens.contiguous().view(width)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(_integers(one), _integers(other))


def _bits(tokens: Tensor) -> list[list[bytes]]:
    """The bytes of each token `(P, N, D)`."""
    plain = _integers(tokens)
    width = plain.shape[2] * plain.element_size()
    data = plain.numpy().tobytes()
    starts = range(0, len(data), width)
    every = [data[start : start + width] for start in starts]
    return [every[i : i + plain.shape[1]] for i in range(0, len(every), plain.shape[1])]


def _lowest(lists: list[list[bytes]], usable: Tensor, together: bool) -> Tensor:
    """Mark the first usable of equal tokens `(S, K)`, of all slots together or of each alone."""
    marks = []
    seen: set[bytes] = set()
    for tokens, may in zip(lists, usable.tolist(), strict=True):
        seen = seen if together else set()
        marks.append([])
        for token, ok in zip(tokens, may, strict=True):
            marks[-1].append(ok and token not in seen)
            if ok:
                seen.add(token)
    return torch.tensor(marks, dtype=torch.bool).view(usable.shape)


class Oracle:
    """All cosines of a problem, and checks of results."""

    def __init__(self, problem: Fuzzed) -> None:
        self.x, arguments = problem.x.clone(), problem.arguments
        self.dtype = self.x.dtype
        self.compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        items, self.tokens, self.channels = self.x.shape
        reference = arguments["reference"]
        self.mode = reference if isinstance(reference, str) else "external"
        self.official = arguments.get("matching") == "official"
        self.sum = arguments.get("combine") == "sum"
        self.size = items // arguments.get("groups", 1)
        self.references, self.per_item = 1, False
        table = self.x
        if isinstance(reference, Tensor):
            self.per_item = reference.ndim == 4
            self.references = 1 if reference.ndim == 2 else reference.shape[-3]
            table = reference.reshape(-1, *reference.shape[-2:]).clone()
        self.reference, self.length = table, table.shape[1]
        mask = arguments.get("reference_mask")
        if mask is None:
            mask = torch.ones(self.length, dtype=torch.bool)
        if self.mode == "external" and not self.per_item:
            self.mask = mask.expand(self.references, self.length)
        elif self.per_item:
            self.mask = mask.expand(items, self.references, self.length).flatten(0, 1)
        else:
            self.mask = mask.expand(items, self.length)
        unit = torch.finfo(self.compute).eps
        self.tolerance = unit * (8.0 + 4.0 * self.channels**0.5)
        self.x_unit, self.x_finite = self._units(self.x)
        self.r_unit, self.r_finite = (
            (self.x_unit, self.x_finite) if table is self.x else self._units(table)
        )
        self.r_bits = _bits(table)
        self.x_bits = self.r_bits if table is self.x else _bits(self.x)

    def _units(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        wide = tokens.double()
        norm = wide.square().sum(dim=-1).sqrt()
        finite = norm.square() <= torch.finfo(self.compute).max
        unit = wide / norm.clamp_min(1e-12)[..., None]
        return torch.where(finite[..., None], unit, 0.0), finite

    def met(self, item: int) -> list[int]:
        """The reference items that an item meets; none for one that does not move."""
        start = item - item % self.size
        if self.mode == "first":
            return [start] if item != start else []
        if self.mode == "others":
            return [other for other in range(start, start + self.size) if other != item]
        first = item * self.references if self.per_item else 0
        return list(range(first, first + self.references))

    def scores(self, item: int) -> Scores:
        """The scores of an item that moves."""
        met = self.met(item)
        slots, count = len(met), self.tokens
        above = torch.zeros(slots, slots, count, dtype=torch.bool)
        references, mask = self.r_unit[met], self.mask[met]
        finite, lists = self.r_finite[met], [self.r_bits[other] for other in met]
        if not self.official:
            usable = finite & mask
            cosine = self.x_unit[item] @ references.mT
            cosine = cosine.where(usable[:, None] & self.x_finite[item][:, None], NOTHING)
            lowest = _lowest(lists, usable, together=not self.sum)
            return Scores(cosine, torch.ones_like(cosine, dtype=torch.bool), lowest, above)
        usable = self.x_finite[item].expand(slots, count)
        cosine = references @ self.x_unit[item].T
        rows = mask & finite & self.x_finite[item]
        cosine = cosine.where(usable[:, None] & rows[..., None], NOTHING)
        lowest = _lowest([self.x_bits[item]] * slots, usable, together=False)
        for s in range(slots):
            for t in range(s):
                equal = [a == b for a, b in zip(lists[s], lists[t], strict=True)]
                above[s, t] = torch.tensor(equal) & rows[t]
        valid = finite[:, None].expand_as(cosine)
        return Scores(cosine, valid, lowest, above)

    def check_decision(
        self, scores: Scores, threshold: Tensor, may: Tensor, found: Decision
    ) -> None:
        """Check the decision for the best of all given slots; `may` are tokens that may move."""
        cosine, valid, lowest, above = scores
        tolerance = self.tolerance
        slot_best = cosine.amax(dim=2)
        near = (cosine >= slot_best[..., None] - tolerance) & (cosine > NOTHING) & lowest[:, None]
        certain = ~(near & ~valid).any(dim=2) & near.any(dim=2)
        possible = (near & valid).any(dim=2)
        least = slot_best.where(certain, NOTHING).amax(dim=0)
        most = slot_best.where(possible, NOTHING).amax(dim=0)
        slack = 2 * tolerance if self.official else tolerance
        nothing = found.similarity == NOTHING
        _check(~nothing | (least == NOTHING), "no match where there is one")
        _check(nothing | (most > NOTHING), "a match where there is none")
        good = (found.similarity >= least - slack) & (found.similarity <= most + tolerance)
        _check(nothing | good, "wrong similarity")
        admitted = near & valid & (cosine >= least[:, None] - slack)
        moved, row = found.moved, torch.arange(self.tokens)
        slot, token = found.slot.where(moved, 0), found.token.where(moved, 0)
        _check(~moved | may, "a token moved that may not")
        _check(~moved | lowest[slot, token], "not the lowest of equal tokens")
        _check(~moved | admitted[slot, row, token], "not the best token")
        lower = (above[slot, :, row] & certain.T).any(dim=1)
        _check(~moved | ~lower, "not the lowest slot of equal tokens")
        limit = threshold.to(self.compute)
        _check(~moved | (found.similarity.to(self.compute) > limit[slot]), "below its threshold")
        stays = admitted & (cosine <= threshold.double()[:, None, None] + tolerance)
        free = stays.any(dim=2).any(dim=0) | (least == NOTHING)
        _check(moved | ~may | free, "a token above its threshold was left")

    def check_output(self, item: int, y: Tensor, alpha: Tensor, decisions: list[Decision]) -> None:
        """Check the tokens of an item `(N, D)`, given the decision of each slot, or of all."""
        x, met = self.x[item].double(), self.met(item)
        expected, size = x.clone(), x.abs().amax(dim=1)
        untouched = torch.ones(self.tokens, dtype=torch.bool)
        for found in decisions:
            rows = found.moved.nonzero()[:, 0]
            if not len(rows):
                continue
            untouched[rows] = False
            slot = found.slot[rows]
            r = self.reference[torch.tensor(met)[slot], found.token[rows]].double()
            step = alpha.double()[slot][:, None] * (x[rows] - r)
            expected[rows] += step
            size[rows] += step.abs().amax(dim=1)
            size[rows] += alpha.double()[slot].abs() * (
                r.abs().amax(dim=1) + x[rows].abs().amax(dim=1)
            )
        self.check_same(y[untouched], self.x[item][untouched])
        info = torch.finfo(self.dtype)
        inside = expected.abs() <= info.max * (1 - info.eps)
        if SATURATES:
            expected, inside = expected.clamp(-info.max, info.max), torch.ones_like(inside)
        unit = torch.finfo(self.compute).eps
        small = (
            info.smallest_normal if self.dtype != torch.float16 else info.smallest_normal * info.eps
        )
        allowed = expected.abs() * info.eps * 0.5001 + 4 * unit * size[:, None] + small
        good = (y.double() - expected).abs() <= allowed
        _check(good | ~inside | untouched[:, None], "a value beyond rounding")

    def check_same(self, y: Tensor, x: Tensor) -> None:
        _check(_integers(y) == _integers(x), "an unmoved token changed")
