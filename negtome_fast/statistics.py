"""Statistics of a guidance, counted block by block.

A call of a block leaves its matches (`CallMatches`); `Statistics` counts many of them together;
`GuidanceSummary` shows the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .config import Grid

Verdict = Literal["guided", "not guided", "measured only"]

Counts = tuple[int, int, int, float]
"""Number of tokens compared, matched and pushed, and the sum of their similarities."""

NOTHING_COUNTED: Counts = (0, 0, 0, 0.0)

_EQUAL = 1e-5
"""Largest error of the mean similarity, 1, of tokens to themselves."""

MAX_STEP_TOKENS = 2**20
"""Number of tokens of one step whose matches may wait to be counted, 12 bytes each."""

MAX_WAITING_TOKENS = 2**15
"""Number of tokens of several steps whose matches may wait: as many as stay in a CPU's cache."""


@dataclass(frozen=True)
class BlockRow:
    """Counts of one block over all guided forwards.

    Attributes:
        block: name of the block.
        grid: (height, width) of its tokens in the last guided call, where known.
        calls: number of guided calls.
        tokens: number of source tokens that were compared with a reference, over all calls.
        matched: share of them, 0 to 1, whose best cosine similarity exceeded the threshold.
        pushed: share of them, 0 to 1, that were moved; less than `matched` if dropout spared some.
        similarity: mean of their best cosine similarities, -1 to 1.
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
        forwards: number of forwards of the model.
        guided: number of them that lay inside the window.
        groups: number of guidance groups in the last guided forward, over all parts; None if there
            was none.
        measured: number of the forwards inside the window in which every alpha was 0.
        first_timestep: timestep of the first forward of the last run, 1000 (noise) to 0; None if
            there was no run or no timestep.
        window: the window in use, in words, such as `"first_steps=3"`; empty if not known.
        notes: what a user should know about these runs, each a sentence: the warnings, and images
            that pushing cannot separate.
        parts: number of guidance parts in that forward: 2 where the halves of classifier-free
            guidance are concatenated.
    """

    rows: tuple[BlockRow, ...]
    forwards: int
    guided: int
    groups: int | None
    measured: int = 0
    first_timestep: float | None = None
    window: str = ""
    notes: tuple[str, ...] = ()
    parts: int = 1

    @property
    def grouping(self) -> str:
        """Guidance parts and groups of the last guided forward, in words; empty if there was none.

        It is "1 guidance group in the batch", or "2 guidance parts, 2 groups in each".
        """
        if self.groups is None:
            return ""
        groups = self.groups // self.parts
        several = "s" if groups > 1 else ""
        if self.parts == 1:
            return f"{groups} guidance group{several} in the batch"
        return f"{self.parts} guidance parts, {groups} group{several} in each"

    @property
    def verdict(self) -> Verdict:
        """Outcome for the images.

        `"guided"`: at least one token was moved. `"measured only"`: tokens were compared, and alpha
        was 0. `"not guided"`: neither, so the images are those of a run without the guidance.
        """
        total = self.total
        if total.pushed > 0:
            return "guided"
        return "measured only" if total.tokens and self.measured == self.guided else "not guided"

    @property
    def sentence(self) -> str:
        """The verdict as a sentence, with its numbers and its reason."""
        verdict, total = self.verdict, self.total
        share = f"{self.guided} of {self.forwards} model forwards"
        if verdict == "guided":
            return f"NegToMe guided {share}{self.grouping and ', '}{self.grouping}"
        if verdict == "measured only":
            return f"NegToMe measured only, because alpha is 0: {share} lay in the window"
        if not self.forwards:
            reason = "the model was not called"
        elif not self.guided:
            window = f"the window {self.window}" if self.window else "the window"
            reason = f"{share} lay in {window}"
            if self.first_timestep is not None:
                reason += f"; the last run began at timestep {self.first_timestep:.4g}"
        elif not total.tokens:
            reason = f"no token was compared with a reference, though {share} lay in the window"
        elif not total.matched:
            reason = (
                f"in {share} no token was more similar to its reference than the threshold; the "
                f"mean similarity was {total.similarity:.3f}"
            )
        else:
            reason = f"dropout or an alpha of 0 spared every matched token of {share}"
        return f"NegToMe did not guide: {reason}"

    @property
    def total(self) -> BlockRow:
        """All blocks as one row, weighted by their tokens."""
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
        """Returns all attributes, verdict, sentence and total as plain values for JSON."""
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "notes": list(self.notes),
            "window": self.window,
            "first_timestep": self.first_timestep,
            "forwards": self.forwards,
            "guided": self.guided,
            "measured": self.measured,
            "groups": self.groups,
            "parts": self.parts,
            "total": asdict(self.total),
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        head = [self.sentence, *(f"Note: {note}" for note in self.notes)]
        if not self.rows:
            return "\n".join(head)
        rows = (*self.rows, self.total) if len(self.rows) > 1 else self.rows
        width = max(5, *(len(row.block) for row in rows))
        lines = [
            *head,
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


def notes_on(rows: Sequence[BlockRow]) -> tuple[str, ...]:
    """Returns a sentence if all tokens equal their references, so that pushing moves none."""
    counted = [row for row in rows if row.tokens]
    if not counted or any(row.similarity < 1 - _EQUAL or not row.pushed for row in counted):
        return ()
    return (
        "every token is identical to its reference, so pushing cannot separate them; give each "
        "image a seed of its own",
    )


class CallMatches(NamedTuple):
    """Matches that one call of `Guidance.apply` found, kept until many are counted together.

    Attributes:
        block, grid: arguments of the call.
        similarity, pushed: (B, S, N), as `guide_tokens` returns them.
        threshold: () or (S,).
        matched: bool (B, N), the tokens that exceeded a threshold, if `similarity` and `threshold`
            do not determine them; else None.
    """

    block: str
    grid: Grid | None
    similarity: Tensor
    pushed: Tensor
    threshold: Tensor
    matched: Tensor | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Key of calls whose tensors can be stacked."""
        shapes = (self.similarity.shape, self.pushed.shape, self.similarity.dtype)
        return (*shapes, self.similarity.device, id(self.threshold), self.matched is None)


def _plus(known: Counts, counts: Sequence[int], similarity: float) -> Counts:
    tokens, matched, pushed = counts
    return known[0] + tokens, known[1] + matched, known[2] + pushed, known[3] + similarity


class Statistics:
    """Sums of all blocks.

    Sums on an accelerator stay there, so that nothing waits for it. Blocks that are counted
    together have one row each of the same tensors. On a CPU, many steps are counted at once,
    because there the calls cost more than the arithmetic.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, tuple[int, Grid | None]] = {}
        self._sums: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self._counted: dict[str, Counts] = {}
        self._waiting: list[CallMatches] = []
        self._waiting_tokens = 0

    def __getstate__(self) -> dict[str, Any]:
        self._count_waiting()
        return self.__dict__

    def keep(self, matches: Sequence[CallMatches], tokens: int) -> None:
        """Takes the matches of a step, `tokens` in all."""
        if not matches or matches[0].similarity.device.type != "cpu":
            for blocks, counts, similarity in _count_by_kind(matches):
                self.add(blocks, counts, similarity)
            return
        self._waiting += matches
        self._waiting_tokens += tokens
        if self._waiting_tokens > MAX_WAITING_TOKENS:
            self._count_waiting()

    def _count_waiting(self) -> None:
        matches, self._waiting, self._waiting_tokens = self._waiting, [], 0
        for blocks, counts, similarity in _count_by_kind(matches):
            for block, new, total in zip(blocks, counts.tolist(), similarity.tolist(), strict=True):
                known = self._counted.get(block, NOTHING_COUNTED)
                self._counted[block] = _plus(known, new, total)

    def notice(self, block: str, grid: Grid | None) -> None:
        """Counts a call of a block; the order of first calls is the order of the rows."""
        self._blocks[block] = (self._blocks.get(block, (0, None))[0] + 1, grid)

    def add(self, blocks: tuple[str, ...], counts: Tensor, similarity: Tensor) -> None:
        """Adds the sums (K, 3) and (K,) of K calls, as `count_matches` returns them."""
        known = self._sums.get(blocks)
        with torch.inference_mode(False):  # so that a run outside of that mode can add to it
            if known is None:
                known = torch.zeros_like(counts), torch.zeros_like(similarity)
            if known[0].device != counts.device:  # the model was moved
                known = known[0].to(counts.device), known[1].to(counts.device)
        known[0].add_(counts)
        known[1].add_(similarity)
        self._sums[blocks] = known

    def rows(self) -> tuple[BlockRow, ...]:
        """Returns one row per block; reads the sums from the device."""
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


def count_matches(matches: Sequence[CallMatches]) -> tuple[Tensor, Tensor]:
    """Counts K calls of one kind.

    Returns:
        int64 (K, 3), the numbers of tokens compared, matched and pushed; and fp32 (K,), the sums of
        their similarities.
    """
    similarity = torch.stack([call.similarity for call in matches]).detach()
    pushed = torch.stack([call.pushed for call in matches])
    best = similarity.amax(dim=2)
    compared = best > -torch.inf
    known = [call.matched for call in matches if call.matched is not None]
    if known:
        matched = torch.stack(known)
    else:
        matched = (similarity > matches[0].threshold[..., None]).any(dim=2)
    counts = [part.sum(dim=(1, 2)) for part in (compared, matched, (pushed >= 0).any(dim=2))]
    return torch.stack(counts, dim=1), torch.where(compared, best, 0.0).sum(dim=(1, 2)).float()


def _count_by_kind(
    matches: Sequence[CallMatches],
) -> Iterator[tuple[tuple[str, ...], Tensor, Tensor]]:
    """Yields the blocks, and what `count_matches` returns, of calls that can be stacked."""
    kinds: dict[tuple[Any, ...], list[CallMatches]] = {}
    for call in matches:
        kinds.setdefault(call.kind, []).append(call)
    for alike in kinds.values():
        yield tuple(call.block for call in alike), *count_matches(alike)


@dataclass
class RankCounts:
    """Counts of one rank in a block whose tokens are distributed over several ranks.

    Attributes:
        block: name of the block.
        counts: int64 (3,), the numbers of tokens compared, matched and pushed.
        similarity: fp32 (), the sum of their similarities.
    """

    block: str
    counts: Tensor
    similarity: Tensor

    @classmethod
    def of(cls, matches: CallMatches) -> RankCounts:
        counts, similarity = count_matches([matches])
        return cls(matches.block, counts[0], similarity[0])


def sum_over_ranks(
    shares: Sequence[RankCounts], total: Callable[[Tensor], Tensor]
) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Adds up the counts of all ranks, in one exchange for all blocks.

    Args:
        shares: counts of this rank.
        total: sums a tensor over the ranks; all of them must call it.

    Returns:
        The arguments of `Statistics.add`.
    """
    rows = [torch.cat([one.counts.double(), one.similarity.double()[None]]) for one in shares]
    totals = total(torch.stack(rows))
    blocks = tuple(one.block for one in shares)
    return blocks, totals[:, :3].to(torch.int64), totals[:, 3].float()
