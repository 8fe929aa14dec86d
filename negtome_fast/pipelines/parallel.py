"""Several devices: context parallelism, shares of a data-parallel run, and what is refused.

With context parallelism each rank holds some of the tokens of all items. It moves its own tokens
only; those of the references are gathered from all ranks, so the result is that of one process:

    y_i = x_i + alpha * (x_i - r_j)   i on this rank,   j = argmax over the tokens of all ranks
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

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
from ..naive import NOTHING, compute_dtype, is_finite
from .layouts import ImageTokens, Layout

Item = TypeVar("Item")


def split_with_reference(
    items: Sequence[Item], rank: int | None = None, num_processes: int | None = None
) -> list[Item]:
    """Of a data-parallel run: the reference, `items[0]`, and this process's share of the others.

    Every process generates the same reference as item 0 of its batch, from the same seed and
    prompt. It is never modified, so all images are pushed away from one and the same reference
    without any communication. Keep the first image of process 0 only.

    ```python
    seeds = split_with_reference(range(9))       # of 2 processes: 0, 1, 2, 3, 4 and 0, 5, 6, 7, 8
    ```

    Args:
        items: what makes an image, such as its seed, or pairs of prompt and seed.
        rank, num_processes: of this process; None takes them from `torch.distributed` where it is
            initialized, else from the variables RANK and WORLD_SIZE that `torchrun` and
            `accelerate launch` set, else there is one process.

    Returns:
        `items[0]` and a contiguous part of `items[1:]`, as even as possible, longer parts first.

    Raises:
        ValueError: no items; a rank that is not in [0, num_processes).
    """
    if rank is None or num_processes is None:
        if dist.is_available() and dist.is_initialized():
            own, processes = dist.get_rank(), dist.get_world_size()
        else:
            own, processes = (int(os.environ.get(name, d)) for name, d in _ENVIRONMENT)
        rank = own if rank is None else rank
        num_processes = processes if num_processes is None else num_processes
    if not 0 <= rank < num_processes:
        raise ValueError(f"rank {rank} is not one of {num_processes} processes")
    if not items:
        raise ValueError("there must be at least one item, the reference")
    sizes = _shares(len(items) - 1, num_processes)
    start = 1 + sum(sizes[:rank])
    return [items[0], *items[start : start + sizes[rank]]]


_ENVIRONMENT = (("RANK", "0"), ("WORLD_SIZE", "1"))


def refuse_tensor_parallel(model: nn.Module) -> None:
    """Tensor parallelism shards the channels, of which a cosine needs all.

    Parameters that `fully_shard` (FSDP) keeps as DTensors are gathered before they are used, so
    they are none of its business.
    """
    sharded = _parallel_config(model, "tensor_parallel_config") is not None
    # Without process groups there are no DTensors to be looked for among all parameters.
    distributed = "torch.distributed.tensor" in sys.modules and (
        dist.is_available() and dist.is_initialized()
    )
    if not sharded and distributed:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        if not any(isinstance(module, FSDPModule) for module in model.modules()):
            sharded = any(
                isinstance(parameter, DTensor)
                and any(placement.is_shard() for placement in parameter.placements)
                for parameter in model.parameters()
            )
    if sharded:
        raise ValueError(
            f"{type(model).__name__} is tensor-parallel: each rank holds some of the channels of a "
            "token, so tokens cannot be compared; use context parallelism "
            "(diffusers' ContextParallelConfig) or one copy of the model on each device"
        )


def refuse_unknown_sharding(model: nn.Module) -> None:
    """Parallelism that is not diffusers' own, which hands a rank some of the tokens or items.

    ParaAttention and cache-dit mark the model; xDiT's process groups say how many share a forward.
    """
    sharded = bool(getattr(model, "_is_parallelized", False))
    xdit = sys.modules.get("xfuser.core.distributed")
    if xdit is not None and type(model).__module__.split(".")[0] == "xfuser":
        sharded = sharded or any(getattr(xdit, size)() > 1 for size in _XDIT_SIZES)
    if sharded:
        raise ValueError(
            f"{type(model).__name__} is distributed by another library than diffusers, so it is "
            "not known which tokens a rank holds; use diffusers' "
            "enable_parallelism(config=ContextParallelConfig(...)), or one copy on each device"
        )


_XDIT_SIZES = (
    "get_sequence_parallel_world_size",
    "get_classifier_free_guidance_world_size",
    "get_pipeline_parallel_world_size",
)


def _parallel_config(model: nn.Module, name: str) -> Any:
    """What diffusers' `enable_parallelism` was given, if anything."""
    return getattr(getattr(model, "_parallel_config", None), name, None)


def token_shards(model: nn.Module, layout: Layout, image: ImageTokens | None) -> TokenShards | None:
    """How the tokens of a context-parallel forward are distributed; None where they are not.

    Args:
        image: the image tokens of the whole forward.

    Raises:
        ValueError: which tokens a rank holds is not known.
    """
    config = _parallel_config(model, "context_parallel_config")
    if config is None:
        return None
    model_name = type(model).__name__
    if image is None or layout.grid_modules or image.starts is not None:
        raise ValueError(
            f"{model_name} is context-parallel, and it is not known which image tokens a rank "
            "holds, because their number differs between blocks or the captions differ in length; "
            "run it without context parallelism"
        )
    hooks = [(module, hook) for module in model.modules() for hook in _parallel_hooks(module)]
    split = [name for _, hook in hooks if _splits(hook) for name in hook.metadata]
    if layout.joint is not None and "encoder_hidden_states" not in split:
        raise ValueError(
            f"{model_name}: its context-parallel plan does not split the text by itself "
            "(encoder_hidden_states), so it is not known where the image tokens of a rank begin; "
            "run it without context parallelism"
        )
    whole = frozenset(module for module, hook in hooks if not _splits(hook))
    group = config._flattened_mesh.get_group()
    return TokenShards(group, image, whole)


def _parallel_hooks(module: nn.Module) -> list[Any]:
    registry = getattr(module, "_diffusers_hook", None)
    names = ("ContextParallelSplitHook", "ContextParallelGatherHook")
    return [h for h in getattr(registry, "hooks", {}).values() if type(h).__name__ in names]


def _splits(hook: Any) -> bool:
    return type(hook).__name__ == "ContextParallelSplitHook"


def _shares(total: int, parts: int) -> tuple[int, ...]:
    """Sizes of the parts as `torch.tensor_split` makes them."""
    return tuple(total // parts + (part < total % parts) for part in range(parts))


class TokenShards:
    """The image tokens of one forward, distributed over the ranks of a group in their order.

    Args:
        group: the ranks that share the tokens.
        image: the image tokens of all of them. Its stream is split as evenly as possible, longer
            parts first, so the tokens that an edit pipeline appended are on the last ranks.
        gathered: modules whose outputs hold the tokens of all ranks again.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        image: ImageTokens,
        gathered: frozenset[nn.Module] = frozenset(),
    ) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        streams = _shares(image.stream, ranks)
        starts = [sum(streams[:r]) for r in range(ranks)]
        self.group = group
        self.gathered = gathered
        self.sizes = tuple(
            min(max(image.generated - start, 0), size)
            for start, size in zip(starts, streams, strict=True)
        )
        """Generated image tokens on each rank; 0 where it holds conditions only."""
        self.start = sum(self.sizes[:rank])
        self.own = slice(self.start, self.start + self.sizes[rank])
        self.image = ImageTokens(streams[rank], self.sizes[rank], image.grid, image.frames)
        """The image tokens on this rank; the grid is that of all."""

    def gather(self, tokens: Tensor) -> Tensor:
        """The tokens `(B, N, D)` of all ranks, of which this one has `(B, n, D)`; differentiable.

        All ranks must call it.
        """
        gathered: Tensor = _Gather.apply(tokens, self)
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks. All of them must call it."""
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
        """`functional.guide_tokens` of the tokens of all ranks, for those of this rank.

        All ranks must call it with arguments that differ in `x` only.

        Args:
            x: `(B, n, D)`, the tokens of this rank.
            reference: `"first"`, `"others"`, or tensors of whole references, the same on all ranks.
            reference_mask, source_mask: of all N tokens.
            dropout: drawn for all N tokens on every rank, so generators must be in equal states.

        Returns:
            y `(B, n, D)`, similarity and pushed `(B, S, n)`; what is pushed away from is numbered
            as in one process. With `matching="paper"` only references travel, with `"official"`
            also one similarity and number for each reference token.
        """
        check_tokens(x)
        # Costs no memory, and has the shape that arguments refer to.
        everywhere = x.new_empty(()).expand(x.shape[0], sum(self.sizes), x.shape[2])
        problem = check_problem(everywhere, reference, reference_mask, matching, groups)
        check_combine(combine)
        strength = parameter_tensor("alpha", alpha, x, problem.pairing.slots)
        limit = parameter_tensor("threshold", threshold, x, problem.pairing.slots)
        source_mask = draw_source_mask(everywhere, source_mask, dropout, generator)
        source_mask = None if source_mask is None else source_mask[:, self.own]

        slots = problem.pairing.slots if combine == "sum" else 1
        shape = (x.shape[0], slots, x.shape[1])
        similarity = x.new_full(shape, NOTHING, dtype=compute_dtype(x.dtype))
        pushed = x.new_full(shape, -1, dtype=torch.int64)
        pieces, done = [], 0
        for items, references, allowed in self._parts(x, problem, groups):
            kept = None if source_mask is None else source_mask[items]
            if matching == "paper":
                guided, similarity[items], pushed[items] = guide_tokens(
                    x[items],
                    references,
                    alpha=strength,
                    threshold=limit,
                    reference_mask=allowed,
                    combine=combine,
                    source_mask=kept,
                    inplace=inplace,
                    backend=backend,
                )
            else:
                similarities, indices = self._match_official(x[items], references, allowed, backend)
                guided, similarity[items], pushed[items] = _push(
                    x[items], references, similarities, indices, strength, limit, kept, combine
                )
                if inplace:
                    x[items] = guided
            pieces += [x[done : items.start], guided]
            done = items.stop
        return x if inplace else torch.cat([*pieces, x[done:]]), similarity, pushed

    def _parts(
        self, x: Tensor, problem: MatchProblem, groups: int
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Items with the same references: the items, the references `(R, M, D)`, mask `(R, M)`."""
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

    def _match_official(
        self, x: Tensor, references: Tensor, allowed: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        """For the reference token at each place of this rank, the best source token of all ranks.

        Returns similarity and index `(B, R, n)`; -inf and -1 where there is none.
        """
        found = [match_tokens(references, tokens, backend=backend) for tokens in x.detach()]
        similarity = torch.stack([similarity for similarity, _ in found])
        index = torch.stack([index for _, index in found])
        best = similarity.clone()
        dist.all_reduce(best, dist.ReduceOp.MAX, self.group)
        # Of equal ones the lowest, as in one process.
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
    """Concatenates the tokens of all ranks; a token's gradient is summed over those who used it."""

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
    """Items `(B, n, D)` pushed away from the tokens `index` `(B, R, n)` of references `(R, N, D)`.

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
        moved = moved + torch.where(pushed[:, slot, :, None], step, 0.0)
    guided = torch.where(pushed.any(dim=1)[..., None], moved.to(x.dtype), x)
    flat = torch.where(pushed, slots * tokens + index, -1)
    if combine == "nearest":
        return guided, similarity.amax(dim=1, keepdim=True), flat.amax(dim=1, keepdim=True)
    return guided, similarity, flat
