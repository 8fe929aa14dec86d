"""The operator in plain torch with linear memory: CPU, MPS, and GPUs without Triton.

Only one tile of similarities exists at a time: a block of reference tokens is normalised once,
every chunk of source tokens is multiplied with it, and each token keeps a running `(maximum,
index)`. Only columns are normalised: the norm of a source token does not change its argmax. On a
CPU with int8 instructions, the products of `coarse` do most of the work. On a GPU, fp32 products
follow `torch.set_float32_matmul_precision`: leave it at "highest" for exact matches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..call import Call
from ..naive import NOTHING, compute_dtype, is_finite, per_slot, saturated
from ..pairing import Pairing
from . import coarse, equal, small
from .pieces import EPSILON, RUN, Search, improve, padded, piece_rows, slices
from .workers import ALONE, Team, conduct

T = TypeVar("T")
#: Size of a block of normalised reference tokens: 8 MB in fp32.
BLOCK_ELEMENTS = 2 * 2**20
#: Number of tokens that are pushed at a time on an accelerator.
PUSH_ROWS = 1024


@lru_cache(maxsize=64)
def _pairs(pairing: Pairing, matching: str) -> dict[int, list[tuple[int, int, int]]]:
    """Lists of all pairs `(item, slot, reference item)`, by the item whose tokens are columns."""
    by_columns: dict[int, list[tuple[int, int, int]]] = {}
    for item in pairing.sources:
        for slot in range(pairing.slots):
            pair = (item, slot, pairing.reference_item(item, slot))
            by_columns.setdefault(pair[2] if matching == "paper" else item, []).append(pair)
    return by_columns


class _Tiles:
    """Tile sizes, and scratch memory that all tiles of a thread share."""

    def __init__(self, x: Tensor, reference: Tensor, team: Team) -> None:
        self.dtype, self.team = compute_dtype(x.dtype), team
        longest = max(x.shape[1], reference.shape[1])
        fitting = max(256, BLOCK_ELEMENTS // x.shape[2] // RUN * RUN)
        if x.device.type == "cpu":
            # The scores stay in a core's cache until their maximum is found.
            self.rows, self.columns = min(longest, 512), min(padded(longest), fitting, 1024)
            self.block = fitting // self.columns * self.columns
        else:
            self.rows, self.columns = min(longest, 4096), min(padded(longest), fitting, 4096)
            self.block = self.columns
        size = self.rows * self.columns
        self.scores = torch.empty(team.size, size, dtype=self.dtype, device=x.device)

    def product(self, rows: Tensor, columns: Tensor, member: int) -> Tensor:
        """`rows @ columns.T` in the thread's scratch memory; its next product overwrites it."""
        shape = (rows.shape[0], columns.shape[0])
        scores = self.scores[member, : shape[0] * shape[1]].view(shape)
        return torch.mm(rows, columns.T, out=scores)


class _UnitColumns(NamedTuple):
    """A block of tokens of unit length as the columns of a product.

    Attributes:
        columns: `(M', D)`, in whole runs; those that may not be chosen are zero.
        excluded: bool `(M',)`, True for those; None if they are only the columns from `length` on.
        length: number of tokens.
    """

    columns: Tensor
    excluded: Tensor | None
    length: int

    @classmethod
    def of(
        cls, tokens: Tensor, allowed: Tensor | None, dtype: torch.dtype, team: Team
    ) -> _UnitColumns:
        count, channels = tokens.shape
        on_cpu = tokens.device.type == "cpu"
        columns = tokens.new_empty(padded(count), channels, dtype=dtype)
        usable = tokens.new_zeros(padded(count), dtype=torch.bool)
        parts = slices(count, piece_rows(channels) if on_cpu else count)

        def normalize(member: int, number: int) -> None:
            part = parts[number]
            wide = tokens[part].to(dtype)
            norm = torch.linalg.vector_norm(wide, dim=-1)
            may = norm.isfinite() if allowed is None else norm.isfinite() & allowed[part]
            torch.div(wide, norm.clamp_min(EPSILON)[:, None], out=columns[part])
            # On an accelerator reading a mask would wait for the device; masking nothing is cheap.
            if not on_cpu or not bool(may.all()):
                columns[part].masked_fill_(~may[:, None], 0)
            usable[part] = may

        team.each(len(parts), normalize)
        columns[count:] = 0
        masked = not on_cpu or not bool(usable[:count].all())
        return cls(columns, ~usable if masked else None, count)


def _row_maximum(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row and its lowest index.

    On a CPU a maximum without index is vectorised, one with index is not; so the index is searched
    for only in the run of columns that holds the maximum.
    """
    rows, columns = scores.shape
    if scores.device.type != "cpu" or columns == RUN:
        return scores.max(dim=1)
    runs = scores.view(rows, columns // RUN, RUN)
    run = runs.amax(dim=2).max(dim=1).indices
    value, offset = runs[torch.arange(rows, device=scores.device), run].max(dim=1)
    return value, run * RUN + offset


def _search(columns: Tensor, allowed: Tensor | None, searches: list[Search], tiles: _Tiles) -> None:
    """Fill in the best column for the rows of every search: the tiles and their maximum."""
    tasks = [(entry, part) for entry in searches for part in slices(len(entry.rows), tiles.rows)]
    for start in range(0, columns.shape[0], tiles.block):
        allowed_here = None if allowed is None else allowed[start : start + tiles.block]
        tokens = columns[start : start + tiles.block]
        block = _UnitColumns.of(tokens, allowed_here, tiles.dtype, tiles.team)

        def multiply(
            member: int, number: int, start: int = start, block: _UnitColumns = block
        ) -> None:
            entry, part = tasks[number]
            rows, best, index = entry.rows[part].to(tiles.dtype), entry.best[part], entry.at[part]
            if start == 0:
                torch.linalg.vector_norm(rows, dim=-1, out=entry.norm[part])
            for first in range(0, len(block.columns), tiles.columns):
                some = slice(first, first + tiles.columns)
                scores = tiles.product(rows, block.columns[some], member)
                if block.excluded is not None:
                    scores.masked_fill_(block.excluded[some], NOTHING)
                elif block.length < first + scores.shape[1]:
                    scores[:, block.length - first :] = NOTHING
                value, at = _row_maximum(scores)
                improve(best, index, value, at + (start + first))

        tiles.team.each(len(tasks), multiply)


def match(call: Call) -> tuple[Tensor, Tensor]:
    """See `negtome_fast.naive.match`."""
    if small.fits(call):
        return small.match(call)
    return _conduct(partial(_match, call), call.x)


def _look_at_places(valid: Tensor, index: Tensor, norm: Tensor, call: Call, team: Team) -> None:
    """Complete `valid` for official matching: the moved token and its match must be finite.

    `valid`, `index` and the `norm` of the reference tokens are `(B, slots, N)`.
    """
    x, pairing = call.x, call.pairing
    tasks = _parts(x, pairing.sources)

    def look(_: int, number: int) -> None:
        item, part = tasks[number]
        valid[item, :, part] &= is_finite(x[item, part].to(norm.dtype))

    team.each(len(tasks), look)
    valid &= norm.isfinite().gather(2, index.clamp_min(0))
    if call.reference_mask is not None:
        for item in pairing.sources:
            for slot in range(pairing.slots):
                valid[item, slot] &= call.reference_mask[pairing.reference_item(item, slot)]


def _conduct(function: Callable[[Team], T], x: Tensor) -> T:
    """Return `function(team)`, whose team is the threads of a CPU, or else the caller alone."""
    return conduct(function) if x.device.type == "cpu" else function(ALONE)


def _match(call: Call, team: Team) -> tuple[Tensor, Tensor]:
    x, reference, pairing = call.x, call.reference, call.pairing
    paper, reference_mask = call.matching == "paper", call.reference_mask
    dtype = compute_dtype(x.dtype)
    shape = (x.shape[0], pairing.slots, x.shape[1])
    similarity = torch.full(shape, NOTHING, dtype=dtype, device=x.device)
    index = torch.full(shape, -1, dtype=torch.int64, device=x.device)
    tiles, norm = _Tiles(x, reference, team), torch.zeros_like(similarity)
    for shared, members in _pairs(pairing, call.matching).items():
        columns = reference[shared] if paper else x[shared]
        allowed = None if reference_mask is None or not paper else reference_mask[shared]
        searches = [
            Search(x[i] if paper else reference[o], similarity[i, s], index[i, s], norm[i, s])
            for i, s, o in members
        ]
        if coarse.pays(columns, searches):
            coarse.search(columns, allowed, searches, partial(_search, tiles=tiles), team)
        else:
            _search(columns, allowed, searches, tiles)
    valid = norm.isfinite() & (index >= 0)
    if not paper:
        index = equal.settle_sources(call, index, team)
        _look_at_places(valid, index, norm, call, team)
    similarity.div_(norm.clamp_min_(EPSILON))
    similarity, index = similarity.where(valid, NOTHING), index.where(valid, -1)
    if paper:
        return equal.settle(call, similarity, index, team)
    return equal.settle_slots(call, similarity), index


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def guide(call: Call, out: Tensor) -> tuple[Tensor, Tensor]:
    """See `negtome_fast.naive.guide`."""
    if small.fits(call):
        return small.guide(call, out)
    return _conduct(partial(_guide, call, out), call.x)


def _guide(call: Call, out: Tensor, team: Team) -> tuple[Tensor, Tensor]:
    x, reference, pairing, source_mask = call.x, call.reference, call.pairing, call.source_mask
    if out is x and pairing.mode != "first" and _shares_memory(x, reference):
        # A token that has moved must not serve as a reference of another item.
        moved = torch.empty_like(x)
        result = _guide(call, moved, team)
        parts = _parts(x, range(pairing.items))
        team.each(len(parts), lambda _, number: x[parts[number]].copy_(moved[parts[number]]))
        return result

    tokens = reference.shape[1]
    alpha = per_slot(call.alpha, x, pairing.slots)
    threshold = per_slot(call.threshold, x, pairing.slots)
    similarity, index = _match(call, team)
    pushed = similarity > threshold[:, None]
    if source_mask is not None:
        pushed &= source_mask[:, None]
    flat = index
    if pairing.slots > 1:
        slots = torch.arange(pairing.slots, device=x.device)[:, None]
        flat = index + slots * tokens
        if call.combine == "nearest":
            similarity, best_slot = similarity.max(dim=1, keepdim=True)
            flat, pushed = flat.gather(1, best_slot), pushed.gather(1, best_slot)
    flat = torch.where(pushed, flat, -1)

    tasks = _parts(x, pairing.sources)
    copies = []
    if out is not x and pairing.mode == "first":
        copies = _parts(x, range(0, pairing.items, pairing.group_size))

    def push(_: int, number: int) -> None:
        if number >= len(tasks):
            place = copies[number - len(tasks)]
            out[place].copy_(x[place])
            return
        item, part = tasks[number]
        numbers = flat[item, :, part]
        _push(x[item, part], reference, pairing, item, alpha, numbers, out[item, part], out is x)

    team.each(len(tasks) + len(copies), push)
    return similarity, flat


def _parts(x: Tensor, items: Iterable[int]) -> list[tuple[int, slice]]:
    """Split items into parts `(item, tokens)`; working on a part takes three times its memory."""
    size = piece_rows(2 * x.shape[2]) if x.device.type == "cpu" else PUSH_ROWS
    return [(item, part) for item in items for part in slices(x.shape[1], size)]


def _push(
    source: Tensor,
    reference: Tensor,
    pairing: Pairing,
    item: int,
    alpha: Tensor,
    numbers: Tensor,
    target: Tensor,
    in_place: bool,
) -> None:
    """Write tokens of an item, `(N, D)`, to `target`, and push some of them.

    A token is pushed from the reference tokens `numbers` `(S, N)`; -1 stands for none.
    """
    moves = (numbers >= 0).any(dim=0)
    if source.device.type != "cpu":
        moved = _moved(source, numbers, reference, pairing, item, alpha)
        torch.where(moves[:, None], moved, source, out=target)
        return
    if bool(moves.all()):
        _moved(source, numbers, reference, pairing, item, alpha, out=target)
        return
    if not in_place:
        target.copy_(source)
    selected = moves.nonzero()[:, 0]
    if selected.numel():
        tokens, numbers = source.index_select(0, selected), numbers[:, selected]
        target.index_copy_(0, selected, _moved(tokens, numbers, reference, pairing, item, alpha))


def _moved(
    tokens: Tensor,
    numbers: Tensor,
    reference: Tensor,
    pairing: Pairing,
    item: int,
    alpha: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Push tokens `(K, D)` of an item from the reference tokens `numbers` `(S, K)`; -1 is none.

    With S = 1, the result is meaningless where the number is -1. `out` may be `tokens`.
    """
    dtype, length = alpha.dtype, reference.shape[1]
    original = tokens.to(dtype)
    out = torch.empty_like(tokens) if out is None else out
    moved = original
    for number in numbers:
        token = number.clamp_min(0)
        if pairing.slots == 1:
            alpha_here = alpha
            chosen = reference[pairing.reference_item(item, 0)].index_select(0, token)
        else:
            slot = token // length
            alpha_here = alpha[slot][:, None]
            chosen = reference[pairing.reference_item(item, slot), token % length]
        chosen = chosen.to(dtype)
        step = torch.sub(original, chosen, out=chosen).mul_(alpha_here)
        if len(numbers) == 1:
            return saturated(step.add_(original), out)
        step = saturated(step.add_(moved), step)
        moved = torch.where((number >= 0)[:, None], step, moved)
    return saturated(moved, out)
