"""Matching on a CPU with int8 instructions: a coarse product, then fp32 cosines of candidates.

Around a common centre c, unit tokens are a = c + s p + e and b = c + t q + f, where p and q are
integers of at most 127, and e and f are their rounding errors. For the columns b of a row a,

    a . b = a . c + s t (p . q) + c . (b - c) + R,    |R| <= |e| |t q| + |a - c| |f|

where a . c does not change the argmax and p . q is exact. Columns that R cannot tell from the best
are compared in fp32. The centre makes R small where all tokens resemble each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..naive import NOTHING, compute_dtype
from .pieces import EPSILON, RUN, Search, improve, padded, piece_rows, slices
from .workers import Team

#: The explicit device and float dtype of new tensors: the caller may have set other defaults.
CPU = "cpu"
FP32: dict[str, Any] = {"dtype": torch.float32, "device": CPU}
#: Size of a block of rounded columns: 16 MB.
BLOCK_ELEMENTS = 2**24
BLOCK_COLUMNS = 4096
#: Rows of each product, and of the first one, which tests whether coarse scores tell columns apart.
ROWS, FIRST_ROWS = 512, 64
#: Largest share of its rows that a coarse product may leave undecided before it is given up.
UNDECIDED = 0.25
#: A row is decided by fp32 scores of single pairs if at most one in `COLUMNS_PER_PAIR` columns, or
#: at most `FEW` columns, are in question: an fp32 product computes some 32 scores in the time of
#: one pair.
COLUMNS_PER_PAIR, FEW = 128, 4
#: Coarse products are used from this many channels, tokens (rows and columns) and multiply-adds of
#: all searches on: products then take most of the time, and a failed first one costs little.
LEAST_CHANNELS, LEAST_TOKENS, LEAST_WORK = 256, 512, 3 * 2**30
#: Largest number of channels: 127^2 times it fits into int32, and an fp32 norm over that many
#: channels is accurate to 2^-10.
MOST_CHANNELS = 2**15 - 1
#: Number of tokens whose mean is the centre. Any centre is right; a good one leaves few questions.
SAMPLE = 64
#: Relative error of an fp32 norm, and rounding error of a unit token in fp32 (a few times 2^-24).
NORM_ERROR, UNIT_ERROR = 2.0**-9, 2.0**-20
#: Relative error of an fp32 sum for each of its terms, whatever their order.
TERM_ERROR = 2.0**-24 * (1 + 2.0**-8)
#: Rounding error in fp32 of a coarse score with its offset and its bound: each of them is less than
#: 8, and fewer than 20 operations have a relative error of 2^-24 each.
SCORE_ERROR = 2.0**-16


def pays(columns: Tensor, searches: list[Search]) -> bool:
    """Return True if `search` is faster than products in fp32."""
    rows, channels = [len(entry.rows) for entry in searches], columns.shape[1]
    return (
        columns.device.type == "cpu"
        and compute_dtype(columns.dtype) == torch.float32
        and LEAST_CHANNELS <= channels <= MOST_CHANNELS
        and min(*rows, len(columns)) >= LEAST_TOKENS
        and sum(rows) * len(columns) * channels >= LEAST_WORK
        and has_int8_products()
    )


def has_int8_products() -> bool:
    """Return True if this processor multiplies int8 faster than fp32, and torch uses that.

    Without such instructions `torch._int_mm` is a plain loop. If `ONEDNN_MAX_CPU_ISA` forbids them,
    the library adds up in int16, which overflows.
    """
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return (
        supported is not None
        and bool(supported())
        and torch.backends.mkldnn.is_available()
        and _products_are_exact()
    )


@cache
def _products_are_exact() -> bool:
    """Return True if the largest int8 products add up correctly."""
    rows = torch.full((2, 256), 127, dtype=torch.int8, device=CPU)
    rows[1] = -127
    product = torch._int_mm(rows.repeat(32, 1), rows.repeat(32, 1).T)
    expected = 127 * 127 * 256
    return bool(
        (product[0::2, 0::2] == expected).all() and (product[0::2, 1::2] == -expected).all()
    )


class _RoundedTokens(NamedTuple):
    """K unit tokens minus the centre, rounded to `values * scale`, with bounds on the error.

    `length` bounds the norm before and after rounding, `error` the norm of the difference.
    `along_centre` is the product with the centre; zero unless asked for.
    """

    values: Tensor  # int8 (K, D); all else (K,)
    scale: Tensor
    length: Tensor
    error: Tensor
    norm: Tensor
    along_centre: Tensor

    @classmethod
    def zeros(cls, count: int, channels: int) -> _RoundedTokens:
        values = torch.zeros(count, channels, dtype=torch.int8, device=CPU)
        return cls(values, *torch.zeros(5, count, **FP32).unbind(0))

    def part(self, part: slice) -> _RoundedTokens:
        return _RoundedTokens(*(tensor[part] for tensor in self))


def _centre(tokens: Tensor) -> Tensor:
    """Centre `(D,)`: the mean of the finite unit tokens of a sample."""
    sample = tokens[:: -(-len(tokens) // SAMPLE)].to(torch.float32)
    norm = torch.linalg.vector_norm(sample, dim=1, keepdim=True)
    unit = torch.where(norm.isfinite(), sample / norm.clamp_min(EPSILON), 0.0)
    return unit.mean(dim=0)


class _ThreadScratch:
    """Memory that a thread uses again and again: new memory costs as much as a step of work."""

    def __init__(self, columns: int, channels: int) -> None:
        self.pieces = torch.empty(2, min(ROWS, piece_rows(channels)), channels, **FP32)
        self.products = torch.empty(ROWS * columns, dtype=torch.int32, device=CPU)

    def halves(self, count: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield the slice of each piece of `count` tokens, and two tensors `(K, D)` for it."""
        for part in slices(count, self.pieces.shape[1]):
            one, other = self.pieces[:, : part.stop - part.start].unbind(0)
            yield part, one, other

    def tile(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Memory for a product, `(rows, columns)`, and the same memory for its scores."""
        product = self.products[: rows * columns].view(rows, columns)
        return product, product.view(torch.float32)


def _widened(tokens: Tensor, memory: Tensor) -> Tensor:
    """`tokens` in fp32; those of another dtype are copied to `memory`."""
    return tokens if tokens.dtype == torch.float32 else memory.copy_(tokens)


def _gathered(tokens: Tensor, numbers: Tensor, memory: Tensor) -> Tensor:
    """The tokens with these indices, copied to `memory`."""
    if tokens.dtype == torch.float32:
        return torch.index_select(tokens, 0, numbers, out=memory)
    return memory.copy_(tokens.index_select(0, numbers))


def _round(
    tokens: Tensor,
    centre: Tensor,
    rounded: _RoundedTokens,
    scratch: _ThreadScratch,
    along_centre: bool,
) -> None:
    """Round `tokens` `(K, D)` one by one into `rounded`, which holds zeros."""
    values, scale, length, error, norm, along = rounded
    for part, unit, whole in scratch.halves(len(tokens)):
        wide = _widened(tokens[part], unit)
        norm[part] = torch.linalg.vector_norm(wide, dim=1)
        inverse = norm[part, None].clamp_min(EPSILON).reciprocal_()
        torch.addcmul(-centre, wide, inverse, out=unit)
        finite = norm[part].isfinite()
        if not bool(finite.all()):
            unit.masked_fill_(~finite[:, None], 0)
        if along_centre:
            along[part] = torch.mul(unit, centre, out=whole).sum(dim=1)
        largest = torch.maximum(unit.amax(dim=1), -unit.amin(dim=1)).clamp_min_(EPSILON)
        scale[part] = largest / 127
        torch.mul(unit, (127 / largest)[:, None], out=whole).round_()
        values[part] = whole
        length[part] = torch.linalg.vector_norm(unit, dim=1)
        torch.addcmul(unit, whole, scale[part, None], value=-1, out=unit)
        error[part] = torch.linalg.vector_norm(unit, dim=1)
    error.mul_(1 + NORM_ERROR).add_(UNIT_ERROR)
    length.mul_(1 + NORM_ERROR).add_(error)


def _rounded(
    tokens: Tensor, centre: Tensor, count: int, scratch: _ThreadScratch, along_centre: bool
) -> _RoundedTokens:
    """Round `tokens` `(K, D)`, and pad them with zeros up to `count`."""
    rounded = _RoundedTokens.zeros(count, tokens.shape[1])
    _round(tokens, centre, rounded.part(slice(len(tokens))), scratch, along_centre)
    return rounded


class _RoundedColumns(NamedTuple):
    """A block of columns: tokens `(M, D)`; other fields are padded to whole runs, `(M', ...)`."""

    tokens: Tensor
    centre: Tensor
    rounded: _RoundedTokens
    excluded: Tensor | None
    longest: float

    @classmethod
    def of(
        cls, tokens: Tensor, allowed: Tensor | None, team: Team, scratch: list[_ThreadScratch]
    ) -> _RoundedColumns | None:
        """Round a block of tokens; None if no column may be chosen."""
        centre = _centre(tokens)
        rounded = _RoundedTokens.zeros(padded(len(tokens)), tokens.shape[1])
        parts = slices(len(tokens), scratch[0].pieces.shape[1])

        def round_part(member: int, number: int) -> None:
            part = parts[number]
            _round(tokens[part], centre, rounded.part(part), scratch[member], along_centre=True)

        team.each(len(parts), round_part)
        usable = rounded.norm.isfinite()
        usable[len(tokens) :] = False
        if allowed is not None:
            usable[: len(tokens)] &= allowed
        if not bool(usable.any()):
            return None
        excluded = None if bool(usable.all()) else ~usable
        return cls(tokens, centre, rounded, excluded, float(rounded.length.amax()))


def _candidates(
    rows: _RoundedTokens, block: _RoundedColumns, scratch: _ThreadScratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Find pairs `(row, column)`, `(P,)` each and ascending, that include the best of each row.

    The last tensor, bool `(K,)`, marks rows that are left out, because too many of their columns
    are in question. Rows that are not finite have no pairs.
    """
    columns = block.rounded
    products, scores = scratch.tile(len(rows.values), len(columns.values))
    torch._int_mm(rows.values, columns.values.T, out=products)
    # The bound on R is the sum of one number of the row and one of the column. The latter includes
    # the rounding of c . (b - c), which is a sum over all channels; |c| is at most 1.
    row_bound = rows.error * block.longest
    sum_error = block.tokens.shape[1] * TERM_ERROR
    column_bound = columns.error * rows.length.amax() + columns.length * sum_error
    lower_offset = columns.along_centre - column_bound
    if block.excluded is not None:
        lower_offset.masked_fill_(block.excluded, NOTHING)
    # In the same memory: every element is read before it is written.
    scores.copy_(products).mul_(rows.scale[:, None])
    torch.addcmul(lower_offset, scores, columns.scale, out=scores)

    by_run, twice = scores.view(len(scores), -1, RUN), (2 * column_bound).view(-1, RUN)
    highest = by_run.amax(dim=2)
    level = highest.amax(dim=1) - 2 * row_bound - SCORE_ERROR
    level.masked_fill_(~rows.norm.isfinite(), torch.inf)
    near = highest + twice.amax(dim=1) >= level[:, None]
    row, run = near.nonzero().unbind(1)
    pair, offset = (by_run[row, run] + twice[run] >= level[row, None]).nonzero().unbind(1)
    row, column = row[pair], run[pair] * RUN + offset
    left = torch.bincount(row, minlength=len(level)) > max(
        FEW, len(columns.values) // COLUMNS_PER_PAIR
    )
    decided = ~left[row]
    return row[decided], column[decided], left


def _scores_of_pairs(
    rows: Tensor, row: Tensor, columns: Tensor, column: Tensor, scratch: _ThreadScratch
) -> Tensor:
    """Products `(P,)` of the given rows with the given columns at unit length, in fp32.

    Every pair is added up in the same order, so that equal columns tie. No product overflows, since
    it is less than the product of two norms whose squares do not overflow.
    """
    scores = torch.empty(len(row), **FP32)
    for part, source, target in scratch.halves(len(row)):
        _gathered(rows, row[part], source)
        _gathered(columns, column[part], target)
        norm = torch.linalg.vector_norm(target, dim=1).clamp_min_(EPSILON)
        torch.div(source.mul_(target).sum(dim=1), norm, out=scores[part])
    return scores


def _best_of_pairs(
    scores: Tensor, row: Tensor, column: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Maximum `(count,)` over the pairs of each row, and its lowest column; else -inf and -1."""
    best = torch.full((count,), NOTHING, **FP32).scatter_reduce_(0, row, scores, "amax")
    winner = scores == best[row]
    index = torch.full((count,), torch.iinfo(torch.int64).max, device=CPU)
    index.scatter_reduce_(0, row[winner], column[winner], "amin")
    return best, index.where(best > NOTHING, -1)


class _Product(NamedTuple):
    """Rows of a search that are multiplied together, and the index of that search."""

    place: int
    part: slice


def _products(searches: list[Search]) -> list[_Product]:
    """Split the rows of all searches into products; the first, and those beside it, are small."""
    longest = len(searches[0].rows)
    first, next_few = min(FIRST_ROWS, ROWS), min(3 * FIRST_ROWS, ROWS)
    ends = [0, min(first, longest), min(first + next_few, longest)]
    products = [_Product(0, slice(*part)) for part in pairwise(ends) if part[0] < part[1]]
    for place, entry in enumerate(searches):
        rest = slices(len(entry.rows), ROWS, start=0 if place else ends[-1])
        products += [_Product(place, part) for part in rest]
    return products


class _Decided(NamedTuple):
    """Best score in a block and its index, `(K,)`; and the indices of undecided rows."""

    best: Tensor
    at: Tensor
    left: Tensor


def _decide(
    rows: Tensor, norm: Tensor, block: _RoundedColumns, scratch: _ThreadScratch
) -> _Decided:
    """Decide the rows that scores of pairs can decide; also fill in the norms of the rows."""
    rounded = _rounded(rows, block.centre, len(rows), scratch, along_centre=False)
    norm.copy_(rounded.norm)
    row, column, undecided = _candidates(rounded, block, scratch)
    scores = _scores_of_pairs(rows, row, block.tokens, column, scratch)
    best, at = _best_of_pairs(scores, row, column, len(rows))
    return _Decided(best, at, undecided.nonzero()[:, 0])


def _search_block(
    searches: list[Search],
    block: _RoundedColumns,
    start: int,
    team: Team,
    scratch: list[_ThreadScratch],
) -> tuple[list[tuple[Search, Tensor | slice]], bool]:
    """Update the searches with the block of columns that starts at `start`.

    The first product that leaves too many rows is the last one that counts, even if another thread
    has finished a later one: no result depends on the threads.

    Returns:
        The rows of each search that are left to a product in fp32; and True if the coarse product
        should be tried again.
    """
    products = _products(searches)
    found: dict[int, _Decided] = {}
    in_vain: list[int] = []

    def multiply(member: int, number: int) -> None:
        if in_vain and number > min(in_vain):
            return
        place, part = products[number]
        rows, norm = searches[place].rows[part], searches[place].norm[part]
        found[number] = _decide(rows, norm, block, scratch[member])
        # The few rows at the end of a search are too small a sample.
        if len(found[number].left) > UNDECIDED * len(rows) and len(rows) >= min(FIRST_ROWS, ROWS):
            in_vain.append(number)

    team.each(len(products), multiply)
    left: list[list[Tensor]] = [[] for _ in searches]
    seen = [0] * len(searches)
    for number in range(min(in_vain, default=len(products) - 1) + 1):
        (place, part), decided = products[number], found[number]
        entry = searches[place]
        improve(entry.best[part], entry.at[part], decided.best, decided.at + start)
        left[place].append(decided.left + part.start)
        seen[place] = part.stop
    rest: list[tuple[Search, Tensor | slice]] = []
    for entry, numbers, count in zip(searches, left, seen, strict=True):
        if numbers and len(undecided := torch.cat(numbers)):
            rest.append((entry, undecided))
        if count < len(entry.rows):
            rest.append((entry, slice(count, None)))
    return rest, not in_vain


def _score_again(
    rows: Tensor,
    value: Tensor,
    at: Tensor,
    columns: Tensor,
    team: Team,
    scratch: list[_ThreadScratch],
) -> None:
    """Recompute the scores of `(row, at)` as scores of pairs, which compare between blocks."""
    chosen = (at >= 0).nonzero()[:, 0]
    parts = slices(len(chosen), scratch[0].pieces.shape[1])

    def score(member: int, number: int) -> None:
        row = chosen[parts[number]]
        value[row] = _scores_of_pairs(rows, row, columns, at[row], scratch[member])

    team.each(len(parts), score)


def _search_rest(
    rest: list[tuple[Search, Tensor | slice]],
    columns: Tensor,
    allowed: Tensor | None,
    start: int,
    in_fp32: Callable[[Tensor, Tensor | None, list[Search]], None],
    team: Team,
    scratch: list[_ThreadScratch],
    again: bool,
) -> None:
    """Fill in the given rows of searches by a product in fp32.

    `again`: recompute the scores found as scores of pairs, to compare them with other blocks.
    """
    found = []
    for entry, which in rest:
        rows = entry.rows[which]
        best, norm = torch.full((2, len(rows)), NOTHING, **FP32).unbind(0)
        found.append(Search(rows, best, torch.full((len(rows),), -1, device=CPU), norm))
    in_fp32(columns, allowed, found)
    for (entry, which), (rows, value, at, norm) in zip(rest, found, strict=True):
        entry.norm[which] = norm
        if again:
            _score_again(rows, value, at, columns, team, scratch)
        best, index = entry.best[which], entry.at[which]
        improve(best, index, value, at + start)
        entry.best[which], entry.at[which] = best, index


def search(
    columns: Tensor,
    allowed: Tensor | None,
    searches: list[Search],
    in_fp32: Callable[[Tensor, Tensor | None, list[Search]], None],
    team: Team,
) -> None:
    """Fill in the best of the `columns` `(M, D)` for the rows of every search.

    `in_fp32` does the same for rows that the coarse product leaves undecided. Once these are too
    many, the coarse product is not tried any more.
    """
    size = min(BLOCK_COLUMNS, max(LEAST_TOKENS, BLOCK_ELEMENTS // columns.shape[1] // RUN * RUN))
    widest = min(size, padded(len(columns)))
    scratch = [_ThreadScratch(widest, columns.shape[1]) for _ in range(team.size)]
    tried = True
    for start in range(0, len(columns), size):
        tokens = columns[start : start + size]
        mask = None if allowed is None else allowed[start : start + size]
        block = _RoundedColumns.of(tokens, mask, team, scratch) if tried else None
        rest: list[tuple[Search, Tensor | slice]] = [(entry, slice(None)) for entry in searches]
        if block is not None:
            rest, tried = _search_block(searches, block, start, team, scratch)
        if rest:
            again = size < len(columns)
            _search_rest(rest, tokens, mask, start, in_fp32, team, scratch, again)
