"""Statistics of a guidance, counted block by block.

A call of a block leaves its matches (`Seen`); many of them are counted together (`Statistics`); a
`GuidanceSummary` shows the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

Grid = tuple[int, int]
Counts = tuple[int, int, int, float]
"""Tokens compared, matched and pushed, and the sum of their similarities."""

NOTHING_COUNTED: Counts = (0, 0, 0, 0.0)

SEEN_TOKENS = 2**20
"""Tokens whose matches are kept at most, 12 bytes each, before they are counted."""

WAITING_TOKENS = 2**15
"""The same where those of several steps wait: as many as stay in a cache."""


@dataclass(frozen=True)
class BlockRow:
    """Counts of one block over all guided forwards.

    Attributes:
        block: name of the block.
        grid: (height, width) of its tokens when it was last guided, where known.
        calls: number of guided forwards.
        tokens: source tokens that were compared with a reference, over all calls.
        matched: share of them whose best cosine similarity exceeded the threshold.
        pushed: share of them that were moved; below `matched` where dropout spared some.
        similarity: mean of their best cosine similarity.
    """

    block: str
    grid: Grid | None
    calls: int
    tokens: int
    matched: float
    pushed: float
    similarity: float


@dataclass(frozen=True)
class GuidanceSummary:
    """Counts of a guidance since it was applied or last reset; `print` shows a table.

    Attributes:
        rows: one entry for each guided block, in the order in which they ran.
        forwards: forwards of the model that were seen.
        guided: those of them that lay inside the window.
        groups: guidance groups of the last guided forward; None if there was none.
    """

    rows: tuple[BlockRow, ...]
    forwards: int
    guided: int
    groups: int | None

    @property
    def total(self) -> BlockRow:
        """All blocks taken together, weighted by their tokens."""
        tokens = sum(row.tokens for row in self.rows)

        def mean(name: str) -> float:
            weighted = sum(getattr(row, name) * row.tokens for row in self.rows if row.tokens)
            return weighted / tokens if tokens else 0.0

        return BlockRow(
            block="all blocks",
            grid=None,
            calls=sum(row.calls for row in self.rows),
            tokens=tokens,
            matched=mean("matched"),
            pushed=mean("pushed"),
            similarity=mean("similarity"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold: forwards, guided, groups, total and rows."""
        return {
            "forwards": self.forwards,
            "guided": self.guided,
            "groups": self.groups,
            "total": asdict(self.total),
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        head = f"NegToMe guided {self.guided} of {self.forwards} model forwards"
        if self.groups is not None:
            head += f", {self.groups} guidance group{'s' if self.groups > 1 else ''} in the batch"
        if not self.rows:
            return head + "; no token was compared with a reference"
        rows = (*self.rows, self.total) if len(self.rows) > 1 else self.rows
        width = max(5, *(len(row.block) for row in rows))
        lines = [
            head,
            f"{'block':<{width}}  {'grid':>9}  {'calls':>5}  {'tokens':>9}  "
            f"{'matched':>7}  {'pushed':>7}  {'similarity':>10}",
        ]
        for row in rows:
            grid = f"{row.grid[0]} x {row.grid[1]}" if row.grid else "-"
            lines.append(
                f"{row.block:<{width}}  {grid:>9}  {row.calls:>5}  {row.tokens:>9}  "
                f"{row.matched:>7.1%}  {row.pushed:>7.1%}  {row.similarity:>10.3f}"
            )
        return "\n".join(lines)


class Seen(NamedTuple):
    """Findings of one call of `apply`, kept until many are counted together.

    Attributes:
        block, grid: of the call.
        similarity, pushed: (B, S, N) as `guide_tokens` returns them.
        threshold: () or (S,).
        matched: (B, N) where one threshold a slot does not tell it, else None.
    """

    block: str
    grid: Grid | None
    similarity: torch.Tensor
    pushed: torch.Tensor
    threshold: torch.Tensor
    matched: torch.Tensor | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Calls of one kind can be stacked."""
        shapes = (self.similarity.shape, self.pushed.shape, self.similarity.dtype)
        return (*shapes, self.similarity.device, id(self.threshold), self.matched is None)


def _plus(known: Counts, counts: Sequence[int], similarity: float) -> Counts:
    tokens, matched, pushed = counts
    return known[0] + tokens, known[1] + matched, known[2] + pushed, known[3] + similarity


class Statistics:
    """Sums of all blocks. Those on an accelerator stay there, so that nothing waits for it.

    Blocks that are counted together have one row each of the same tensors. On a CPU that is done
    for many steps at once: there the calls cost more than the numbers.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, tuple[int, Grid | None]] = {}
        self._sums: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._counted: dict[str, Counts] = {}
        self._waiting: list[Seen] = []
        self._waiting_tokens = 0

    def __getstate__(self) -> dict[str, Any]:
        self._count_waiting()
        return self.__dict__

    def keep(self, seen: Sequence[Seen], tokens: int) -> None:
        """Takes what a step has seen, `tokens` in all."""
        if not seen or seen[0].similarity.device.type != "cpu":
            for blocks, counts, similarity in _counts(seen):
                self.add(blocks, counts, similarity)
            return
        self._waiting += seen
        self._waiting_tokens += tokens
        if self._waiting_tokens > WAITING_TOKENS:
            self._count_waiting()

    def _count_waiting(self) -> None:
        seen, self._waiting, self._waiting_tokens = self._waiting, [], 0
        for blocks, counts, similarity in _counts(seen):
            for block, new, total in zip(blocks, counts.tolist(), similarity.tolist(), strict=True):
                known = self._counted.get(block, NOTHING_COUNTED)
                self._counted[block] = _plus(known, new, total)

    def notice(self, block: str, grid: Grid | None) -> None:
        """Counts a call of a block; blocks are listed in the order of their first."""
        self._blocks[block] = (self._blocks.get(block, (0, None))[0] + 1, grid)

    def add(self, blocks: tuple[str, ...], counts: torch.Tensor, similarity: torch.Tensor) -> None:
        """Adds sums (K, 3) and (K,) of K calls, as `sums_of` returns them."""
        known = self._sums.get(blocks)
        with torch.inference_mode(False):  # else no later run outside of that mode could add to it
            if known is None:
                known = torch.zeros_like(counts), torch.zeros_like(similarity)
            if known[0].device != counts.device:  # the model was moved; what it counted stays
                known = known[0].to(counts.device), known[1].to(counts.device)
        known[0].add_(counts)
        known[1].add_(similarity)
        self._sums[blocks] = known

    def rows(self) -> tuple[BlockRow, ...]:
        """Reads the sums from the device."""
        self._count_waiting()
        counted = dict.fromkeys(self._blocks, NOTHING_COUNTED) | self._counted
        for blocks, (counts, sums) in self._sums.items():
            for block, new, total in zip(blocks, counts.tolist(), sums.tolist(), strict=True):
                counted[block] = _plus(counted[block], new, total)
        rows = []
        for block, (calls, grid) in self._blocks.items():
            tokens, matched, pushed, similarity = counted[block]
            share = 1 / max(tokens, 1)
            shares = matched * share, pushed * share, similarity * share
            rows.append(BlockRow(block, grid, calls, tokens, *shares))
        return tuple(rows)


def sums_of(seen: Sequence[Seen]) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers (K, 3) of tokens compared, matched and pushed in K calls of one kind, and the sums
    (K,) of their similarities."""
    similarity = torch.stack([one.similarity for one in seen]).detach()
    pushed = torch.stack([one.pushed for one in seen])
    best = similarity.amax(dim=2)
    compared = best > -torch.inf
    told = [one.matched for one in seen if one.matched is not None]
    if told:
        matched = torch.stack(told)
    else:
        matched = (similarity > seen[0].threshold[..., None]).any(dim=2)
    counts = [part.sum(dim=(1, 2)) for part in (compared, matched, (pushed >= 0).any(dim=2))]
    return torch.stack(counts, dim=1), torch.where(compared, best, 0.0).sum(dim=(1, 2)).float()


def _counts(
    seen: Sequence[Seen],
) -> Iterator[tuple[tuple[str, ...], torch.Tensor, torch.Tensor]]:
    """Blocks, and `sums_of`, of all calls that can be counted together."""
    kinds: dict[tuple[Any, ...], list[Seen]] = {}
    for one in seen:
        kinds.setdefault(one.kind, []).append(one)
    for alike in kinds.values():
        yield tuple(one.block for one in alike), *sums_of(alike)
