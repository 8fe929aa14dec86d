"""State of one forward of the model, between `Guidance.begin_step` and `end_step`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .config import Grid
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
        groups: guidance groups of its batch.
        grid: (height, width) of its image tokens, where known.
        torch_on_cpu: CPU tokens go to the torch backend without asking the environment.
        guided_blocks, skipped_blocks: number of calls of `apply` so far.
        recording: numbers of the references whose forward is running; None outside of `record`.
        recorded: number of references whose forward is done.
        calls: by block, number of its calls in the references' forward that is running.
        reference_tokens: by block and call, the references' tokens (groups, R, M, D).
        matches: what the calls found, not yet counted; `kept_tokens` is their size.
        shares: this rank's counts in blocks whose tokens are distributed as `shards` describes.
    """

    active: bool
    groups: int
    grid: Grid | None
    torch_on_cpu: bool
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

    def keep_reference(self, image_tokens: Tensor, block: str, references: int) -> None:
        """Keeps the tokens of one call of a block in the references' forward.

        Args:
            image_tokens: (groups * count, M, D), where `recording` spans count references.
            references: number of all references.
        """
        recording, groups = self.recording, self.groups
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
        """Returns the tokens (groups, R, M, D) that the same call kept in the references' forward.

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
    if not isinstance(timestep, Tensor):
        return float(timestep), 0.0
    given = timestep.detach()
    value = float((given.amax() if given.ndim > 1 else given.reshape(-1)[0]).item())
    rounding = torch.finfo(timestep.dtype).eps * 1000 if timestep.is_floating_point() else 0.0
    return value, rounding
