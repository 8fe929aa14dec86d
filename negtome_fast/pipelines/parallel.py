"""Context parallelism: guidance where each rank holds some of the tokens of all items.

A rank moves only its own tokens. The references' tokens are gathered from all ranks, so the result
is that of one process:

    y_i = x_i + alpha * (x_i - r_j)   i on this rank,   j = argmax over the tokens of all ranks
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import (
    MatchProblem,
    ReferenceTokens,
    check_combine,
    check_problem,
    check_tokens,
    draw_source_mask,
    parameter_tensor,
)
from ..functional import guide_tokens, match_tokens
from ..naive import NOTHING, Saturated, compute_dtype, is_finite
from .layouts import ImageTokens


def even_sizes(total: int, parts: int) -> tuple[int, ...]:
    """Returns the sizes of the parts that `torch.tensor_split` makes: even, longer parts first."""
    return tuple(total // parts + (part < total % parts) for part in range(parts))


class TokenShards:
    """The image tokens of one forward, distributed over the ranks of a group in their order.

    Args:
        group: the ranks that share the tokens.
        image: the image tokens of all ranks. The image stream is split as evenly as possible,
            longer parts first, so tokens that an edit pipeline appended are on the last ranks, and
            the given frames of a video on the first.
        gathered: modules whose outputs hold the tokens of all ranks again.

    Attributes:
        sizes: number of generated image tokens on each rank; 0 if it holds conditions only.
        start, own: index of the first one on this rank, and the slice of all of them.
        image: the image tokens on this rank; the grid is that of all ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        image: ImageTokens,
        gathered: frozenset[nn.Module] = frozenset(),
    ) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        streams = even_sizes(image.num_tokens, ranks)
        starts = [sum(streams[:r]) for r in range(ranks)]
        self.group = group
        self.gathered = gathered
        first, end = image.offset, image.offset + image.generated
        self.sizes = tuple(
            max(min(start + size, end) - max(start, first), 0)
            for start, size in zip(starts, streams, strict=True)
        )
        self.start = sum(self.sizes[:rank])
        self.own = slice(self.start, self.start + self.sizes[rank])
        offset = max(first - starts[rank], 0) if self.sizes[rank] else 0
        self.image = ImageTokens(
            streams[rank], self.sizes[rank], image.grid, image.frames, offset=offset
        )

    def gather(self, tokens: Tensor) -> Tensor:
        """Returns the tokens of all ranks `(B, N, D)`, given those of this rank `(B, n, D)`.

        Differentiable. All ranks must call it.
        """
        gathered: Tensor = _Gather.apply(tokens, self)
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of a tensor over the ranks. All of them must call it."""
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def guide_tokens(
        self,
        x: Tensor,
        reference: ReferenceTokens = "first",
        *,
        alpha: float | Tensor = 0.9,
        threshold: float | Tensor = 0.65,
        reference_mask: Tensor | None = None,
        matching: str = "paper",
        groups: int = 1,
        combine: str = "nearest",
        source_mask: Tensor | None = None,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        inplace: bool = False,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes `functional.guide_tokens` of the tokens of all ranks, for those of this rank.

        All ranks must call it, with arguments that differ only in `x`.

        Args:
            x: `(B, n, D)`, the tokens of this rank.
            reference: `"first"`, `"others"`, or tensors of whole references, the same on all ranks.
            reference_mask, source_mask: of all N tokens.
            dropout: drawn for all N tokens on every rank, so generators must be in equal states.

        Returns:
            y `(B, n, D)`, similarity and pushed `(B, S, n)`; references are numbered as in one
            process.
        """
        check_tokens(x)
        # The shape that arguments refer to, without its memory.
        everywhere = x.new_empty(()).expand(x.shape[0], sum(self.sizes), x.shape[2])
        problem = check_problem(everywhere, reference, reference_mask, matching, groups)
        check_combine(combine)
        alpha = parameter_tensor("alpha", alpha, x, problem.pairing.slots)
        threshold = parameter_tensor("threshold", threshold, x, problem.pairing.slots)
        source_mask = draw_source_mask(everywhere, source_mask, dropout, generator)
        source_mask = None if source_mask is None else source_mask[:, self.own]

        slots = problem.pairing.slots if combine == "sum" else 1
        shape = (x.shape[0], slots, x.shape[1])
        similarity = x.new_full(shape, NOTHING, dtype=compute_dtype(x.dtype))
        pushed = x.new_full(shape, -1, dtype=torch.int64)
        pieces, done = [], 0
        settings: dict[str, Any] = {"alpha": alpha, "threshold": threshold, "combine": combine}
        settings |= {"inplace": inplace, "backend": backend}
        guide = guide_tokens if matching == "paper" else self._guide_official
        for items, references, allowed in self._parts(x, problem, groups):
            masks: dict[str, Any] = {
                "reference_mask": allowed,
                "source_mask": None if source_mask is None else source_mask[items],
            }
            guided, similarity[items], pushed[items] = guide(
                x[items], references, **masks, **settings
            )
            pieces += [x[done : items.start], guided]
            done = items.stop
        return x if inplace else torch.cat([*pieces, x[done:]]), similarity, pushed

    def _parts(
        self, x: Tensor, problem: MatchProblem, groups: int
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yields items of the same references, the references `(R, M, D)`, their mask `(R, M)`."""
        reference, mask, items = problem.reference, problem.mask, x.shape[0]
        size = items // groups
        if reference is not None and not problem.pairing.per_item:
            yield slice(0, items), reference, mask
        elif reference is not None:
            for item in range(items):
                rows = slice(item * problem.pairing.slots, (item + 1) * problem.pairing.slots)
                yield slice(item, item + 1), reference[rows], None if mask is None else mask[rows]
        elif problem.pairing.mode == "first" and size > 1:
            reference = self.gather(x[::size])
            for group in range(groups):
                first = group * size
                allowed = None if mask is None else mask[first : first + 1]
                yield slice(first + 1, first + size), reference[group : group + 1], allowed
        elif problem.pairing.mode == "others":
            tokens = self.gather(x)
            for item in range(items):
                first = item - item % size
                others = [other for other in range(first, first + size) if other != item]
                yield (
                    slice(item, item + 1),
                    tokens[others],
                    None if mask is None else mask[others],
                )

    def _guide_official(
        self,
        x: Tensor,
        references: Tensor,
        *,
        alpha: Tensor,
        threshold: Tensor,
        reference_mask: Tensor | None,
        combine: str,
        source_mask: Tensor | None,
        inplace: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes `guide_tokens` with `matching="official"`, for references `(R, N, D)`.

        Each reference token's best similarity and its index travel between the ranks.
        """
        similarity, index = self._match_official(x, references, reference_mask, backend)
        guided, similarity, pushed = _push(
            x, references, similarity, index, alpha, threshold, source_mask, combine
        )
        if inplace:
            guided = x.copy_(guided)
        return guided, similarity, pushed

    def _match_official(
        self, x: Tensor, references: Tensor, allowed: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        """Matches the reference tokens at the positions of this rank with the source of all ranks.

        Returns similarity and index `(B, R, n)` of the best source token; -inf and -1 if there is
        none.
        """
        found = [match_tokens(references, tokens, backend=backend) for tokens in x.detach()]
        similarity = torch.stack([similarity for similarity, _ in found])
        index = torch.stack([index for _, index in found])
        best = similarity.clone()
        dist.all_reduce(best, dist.ReduceOp.MAX, self.group)
        # The lowest index of equal similarities, as in one process.
        tokens = references.shape[1]
        index = torch.where((similarity == best) & (index >= 0), index + self.start, tokens)
        dist.all_reduce(index, dist.ReduceOp.MIN, self.group)
        best, index = best[..., self.own], index[..., self.own]
        chosen_ok = is_finite(references.to(best.dtype)).expand(len(x), -1, -1)
        chosen_ok = chosen_ok.gather(2, index.clamp_max(tokens - 1))
        usable = (index < tokens) & chosen_ok & is_finite(x.to(best.dtype))[:, None]
        if allowed is not None:
            usable &= allowed[:, self.own]
        return best.where(usable, NOTHING), index.where(usable, -1)


class _Gather(torch.autograd.Function):
    """Concatenates the tokens of all ranks; their gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, shards: TokenShards) -> Tensor:
        ctx.shards = shards
        # Padded to one length, because not every backend gathers tensors of different sizes.
        sizes = shards.sizes
        padded = F.pad(tokens, (0, 0, 0, max(sizes) - tokens.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=shards.group)
        return torch.cat([part[:, :n] for part, n in zip(parts, sizes, strict=True)], dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.shards.sum(gradients[0])[:, ctx.shards.own], None


def _push(
    x: Tensor,
    references: Tensor,
    similarity: Tensor,
    index: Tensor,
    alpha: Tensor,
    threshold: Tensor,
    source_mask: Tensor | None,
    combine: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pushes items `(B, n, D)` away from the tokens `index` `(B, R, n)` of references `(R, N, D)`.

    Returns what `guide_tokens` returns.
    """
    number, tokens = references.shape[:2]
    alpha, threshold = alpha.expand(number), threshold.expand(number)
    pushed = (similarity > threshold[:, None]) & (index >= 0)
    if source_mask is not None:
        pushed &= source_mask[:, None]
    slots = torch.arange(number, device=x.device)[:, None]
    if combine == "nearest":
        pushed &= slots == similarity.argmax(dim=1, keepdim=True)
    original = x.to(similarity.dtype)
    moved = original
    for slot in range(number):
        chosen = references[slot].to(moved.dtype)[index[:, slot].clamp_min(0)]
        step = alpha[slot] * (original - chosen)
        step = torch.where(pushed[:, slot, :, None], step, 0.0)
        moved = Saturated.apply(moved + step, moved.dtype)
    moved = Saturated.apply(moved, x.dtype)
    guided = torch.where(pushed.any(dim=1)[..., None], moved, x)
    flat = torch.where(pushed, slots * tokens + index, -1)
    if combine == "nearest":
        return guided, similarity.amax(dim=1, keepdim=True), flat.amax(dim=1, keepdim=True)
    return guided, similarity, flat
