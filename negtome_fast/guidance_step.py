"""State of one forward of the model, between `Guidance.begin_step` and `end_step`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .config import Grid, NegToMeConfig, as_number
from .statistics import CallMatches, RankCounts


class ShardedTokens(Protocol):
    """Image tokens of one forward that are distributed over several ranks.

    `pipelines.parallel.TokenShards` is the implementation.
    """

    def gather(self, tokens: Tensor) -> Tensor:
        """Returns the tokens of all ranks (B, N, D), given those of this rank (B, n, D)."""

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of a tensor over the ranks."""

    @property
    def guide_tokens(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        """`functional.guide_tokens` for the tokens of this rank."""


@dataclass
class GuidanceStep:
    """State of one forward of the model.

    Attributes:
        active: the forward lies in the window.
        groups: guidance groups of its batch, over all parts.
        grid: (height, width) of its image tokens, where known.
        torch_on_cpu: CPU tokens go to the torch backend without asking the environment.
        parts: guidance parts of its batch; they divide `groups`.
        order: int64 (B,), the items of the batch, group by group; None if groups are contiguous.
        branches: how often the batch of the block that is guided holds all items of the forward.
        guided_blocks, skipped_blocks: number of calls of `apply` so far.
        recording: numbers of the references whose forward is running; None outside of `record`.
        recorded: number of references whose forward is done.
        calls: by block, number of its calls in the references' forward that is running.
        reference_tokens: by block and call, the references' tokens (groups * branches, R, M, D).
        matches: what the calls found, not yet counted; `kept_tokens` is their size.
        shares: this rank's counts in blocks whose tokens are distributed as `shards` describes.
    """

    active: bool
    groups: int
    grid: Grid | None
    torch_on_cpu: bool
    parts: int = 1
    order: Tensor | None = None
    branches: int = 1
    guided_blocks: int = 0
    skipped_blocks: int = 0
    recording: slice | None = None
    recorded: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    reference_tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    matches: list[CallMatches] = field(default_factory=list)
    kept_tokens: int = 0
    shares: list[RankCounts] = field(default_factory=list)
    shards: ShardedTokens | None = None

    @property
    def block_groups(self) -> int:
        """Number of groups in the batch of the block that is guided."""
        return self.groups * self.branches

    def only_references(self, items: int) -> bool:
        """Returns True if each group has one item."""
        return items == self.block_groups

    def lone_items(self, items: int) -> tuple[str, str]:
        """Returns a batch whose groups have one item each, in words, and what to do about it."""
        if self.groups > self.parts:
            advice = (
                "generate at least two images for each prompt, or use groups=1, which guides the "
                "images of all prompts as one group"
            )
        else:
            advice = (
                "generate at least two images at once, or push away from an image from outside of "
                'the batch, such as reference=Reference("image.png")'
            )
        return f"a batch of {items} in {self.block_groups} group(s)", advice

    def why_unguided(self, config: NegToMeConfig) -> str:
        """Returns why no block was guided in this step, in words."""
        if self.skipped_blocks:
            return (
                "no block was guided in a step inside the window: every block was left out by "
                f"blocks={config.blocks}, exclude_blocks={config.exclude_blocks} or "
                f"min_grid={config.min_grid}"
            )
        return (
            "no block handed its tokens over in a step inside the window, so nothing was guided; "
            "if the model was compiled and called before it was guided, call "
            "torch.compiler.reset() once now"
        )

    def in_groups(self, image_tokens: Tensor) -> Tensor:
        """Returns the tokens (B, N, D) of the items group by group."""
        assert self.order is not None
        return image_tokens.index_select(0, self._block_order(self.order, image_tokens.device))

    def in_batch(self, image_tokens: Tensor) -> Tensor:
        """Inverts `in_groups`."""
        assert self.order is not None
        order = self._block_order(self.order, image_tokens.device)
        return torch.empty_like(image_tokens).index_copy(0, order, image_tokens)

    def _block_order(self, order: Tensor, device: torch.device) -> Tensor:
        order = order.to(device)
        if self.branches == 1:
            return order
        return torch.cat([order + branch * len(order) for branch in range(self.branches)])

    def keep_reference(self, image_tokens: Tensor, block: str, references: int) -> None:
        """Keeps the tokens of one call of a block in the references' forward.

        Args:
            image_tokens: (block_groups * count, M, D), where `recording` spans count references.
            references: number of all references.
        """
        recording, groups = self.recording, self.block_groups
        assert recording is not None
        count = recording.stop - recording.start
        if image_tokens.shape[0] != groups * count:
            raise ValueError(
                f"the forward of {count} references in {groups} guidance groups needs a batch of "
                f"{groups * count}; the tokens of {block} are {tuple(image_tokens.shape)}"
            )
        kept, call = self.reference_tokens.setdefault(block, []), self.calls.get(block, 0)
        self.calls[block] = call + 1
        if call == len(kept):
            shape = (groups, references, *image_tokens.shape[1:])
            kept.append(image_tokens.new_empty(shape))
        kept[call][:, recording] = image_tokens.detach().unflatten(0, (groups, count))

    def take_reference(self, block: str, references: int) -> Tensor:
        """Returns the tokens that the same call kept in the references' forward.

        Returns:
            (block_groups, R, M, D).

        Raises:
            RuntimeError: there are none.
        """
        if self.recorded < references or not self.reference_tokens.get(block):
            raise RuntimeError(
                f"no tokens of the references were recorded for {block} in this step; run the "
                "model on the references inside of `with guidance.record():` first"
            )
        return self.reference_tokens[block].pop(0)


def read_timestep(timestep: float | Tensor) -> tuple[float, float]:
    """Returns a timestep as a float, and its rounding error on a scale of 1000.

    A tensor (B,) is read by its first element. A tensor of two or more dimensions holds a time for
    each token or frame, 0 for those that are given (image-to-video), and is read by its maximum.

    bf16 keeps 8 bits: a FLUX model is given 0.8984 for 0.9, a timestep of 898.4.
    """
    if not isinstance(timestep, Tensor) or timestep.is_complex() or not timestep.numel():
        return as_number("timestep", timestep), 0.0
    given = timestep.detach()
    value = as_number("timestep", given.amax() if given.ndim > 1 else given.reshape(-1)[0])
    rounding = torch.finfo(timestep.dtype).eps * 1000 if timestep.is_floating_point() else 0.0
    return value, rounding
