"""The state of a guided run that every stack shares: window, groups, block filter, statistics.

Needs torch only. A sampling loop makes three calls: `begin_step` once per forward of its model,
`apply` on the image tokens of each attention output, `end_step` after the forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .config import NegToMeConfig
from .functional import guide_tokens

Grid = tuple[int, int]


@dataclass(frozen=True)
class BlockRow:
    """What the guidance did in one block, over all guided forwards.

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
    """What the guidance did since it was applied or last reset; `print` shows a table.

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


class _BlockStatistics:
    """Sums of one block, kept on its device so that no block waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.calls = 0
        self.grid: Grid | None = None
        with torch.inference_mode(False):  # else no later run outside of that mode could add to it
            self.counts = torch.zeros(3, dtype=torch.int64, device=device)
            self.similarity = torch.zeros((), dtype=torch.float32, device=device)

    def add(
        self,
        similarity: torch.Tensor,
        pushed: torch.Tensor,
        threshold: torch.Tensor,
        grid: Grid | None,
    ) -> None:
        self.calls += 1
        self.grid = grid
        if self.counts.device != similarity.device:  # the model was moved; what it counted stays
            with torch.inference_mode(False):
                self.counts = self.counts.to(similarity.device)
                self.similarity = self.similarity.to(similarity.device)
        best = similarity.detach().amax(dim=1)
        compared = best > -torch.inf
        counts = [compared.sum(), (best > threshold).sum(), (pushed >= 0).any(dim=1).sum()]
        self.counts += torch.stack(counts)
        self.similarity += torch.where(compared, best, 0.0).sum()

    def row(self, block: str) -> BlockRow:
        tokens, matched, pushed = self.counts.tolist()
        share = 1 / max(tokens, 1)
        similarity = self.similarity.item() * share
        return BlockRow(
            block, self.grid, self.calls, tokens, matched * share, pushed * share, similarity
        )


@dataclass
class _Step:
    active: bool
    groups: int
    grid: Grid | None
    guided_blocks: int = 0
    skipped_blocks: int = 0


class Guidance:
    """Guides the image tokens of any sampling loop by one configuration.

    ```python
    guidance = Guidance(NegToMeConfig(alpha=0.9, t_end=800))
    for t in timesteps:                                      # 1000 (noise) to 0
        guidance.begin_step(t)
        for name, block in blocks:
            attended = block.attention(tokens)               # (B, N, D), image tokens only
            tokens = tokens + guidance.apply(attended, block=name)
            ...
        guidance.end_step()
    print(guidance.summary())
    ```

    Args:
        config: the settings; `NegToMeConfig()` if None. Its `placement` is where the caller
            calls `apply`, and its `groups`, if set, goes before that of `begin_step`.

    Attributes:
        reference_mask: None, or a function from a block's (height, width) to bool
            (height * width,): the tokens of in-batch references that may be matched, or with
            `matching="official"` the tokens that may move.
    """

    def __init__(self, config: NegToMeConfig | None = None) -> None:
        if config is None:
            config = NegToMeConfig()
        if not isinstance(config, NegToMeConfig):
            raise TypeError(f"config must be a NegToMeConfig, not {type(config).__name__}")
        self.config = config
        self._step: _Step | None = None
        self._scalars: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._generators: dict[torch.device, torch.Generator] = {}
        self._included: dict[str, bool] = {}
        self._warned: set[str] = set()
        self.reference_mask: Callable[[Grid], torch.Tensor] | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets the statistics."""
        self._statistics: dict[str, _BlockStatistics] = {}
        self._forwards = 0
        self._guided = 0
        self._groups: int | None = None

    def begin_run(self) -> None:
        """Starts the dropout's random numbers anew, so that an equal run gives equal results.

        Each warning is given once per run.
        """
        self._generators.clear()
        self._warned.clear()

    def begin_step(
        self,
        timestep: float | torch.Tensor | None = None,
        *,
        step: int | None = None,
        num_steps: int | None = None,
        groups: int = 1,
        grid: Grid | None = None,
        tolerance: float | None = None,
    ) -> bool:
        """Opens a forward of the model; returns whether it lies in the window.

        Args:
            timestep: in the scheduler's unit, 1000 (noise) to 0; a tensor is read once, here: by
                its first element, or by its maximum where it has two or more dimensions (a time
                for each token). May be None where the configuration has `steps`.
            step, num_steps: index of the step from 0 and number of steps of the run; needed where
                the configuration has `steps`.
            groups: equal contiguous parts of the batch that never see each other; 2 where
                unconditional and conditional halves are concatenated.
            grid: (height, width) of the image tokens, needed where the configuration has
                `min_grid`; `apply` may name another for its block.
            tolerance: rounding of `timestep` in timesteps; None takes it from a tensor's dtype.
        """
        if timestep is not None:
            timestep, rounding = read_timestep(timestep)
            tolerance = rounding if tolerance is None else tolerance
        active = self.config.includes_step(timestep, step, num_steps, tolerance or 0.0)
        groups = self.config.groups or groups
        self._step = _Step(active, groups, grid)
        self._forwards += 1
        if active:
            self._guided += 1
            self._groups = groups
        return active

    def end_step(self, *, completed: bool = True) -> None:
        """Closes the forward; may be called at any time, with completed=False after an error."""
        step, self._step = self._step, None
        if not completed or step is None or not step.active or step.guided_blocks:
            return
        if step.skipped_blocks:
            self._warn(
                "no block was guided in a step inside the window: every block was left out by "
                f"blocks={self.config.blocks}, exclude_blocks={self.config.exclude_blocks} or "
                f"min_grid={self.config.min_grid}"
            )
        else:
            self._warn(
                "no block handed its tokens over in a step inside the window, so nothing was "
                "guided; if the model was compiled and called before it was guided, call "
                "torch.compiler.reset() once now"
            )

    @property
    def active(self) -> bool:
        """Whether a forward inside the window is open."""
        return self._step is not None and self._step.active

    def apply(
        self,
        image_tokens: torch.Tensor,
        *,
        block: str = "block",
        grid: Grid | None = None,
        inplace: bool = False,
    ) -> torch.Tensor:
        """The guided tokens; the argument itself where nothing is to be done.

        Args:
            image_tokens: (B, N, D), any strides, the image tokens of one block.
            block: the block's name, for the filter and the statistics.
            grid: (height, width) with N = height * width, if not that of the step.
            inplace: write into `image_tokens`, which then must be nobody else's.

        Raises:
            RuntimeError: no step is open.
            ValueError, TypeError: as `negtome`; and if `min_grid` is set and no grid is known.
        """
        step = self._step
        if step is None:
            raise RuntimeError("apply outside of a step; call begin_step before the forward")
        if not step.active:
            return image_tokens
        grid = grid or step.grid
        if not self._includes_block(block) or not self.config.includes_grid(grid):
            step.skipped_blocks += 1
            return image_tokens
        step.guided_blocks += 1
        config = self.config
        if config.reference == "first" and image_tokens.shape[0] == step.groups:
            self._warn(
                f"a batch of {step.groups} in {step.groups} group(s) has only reference items, so "
                "nothing is pushed; generate at least two images, or use reference='others'"
            )
            return image_tokens
        alpha, threshold = self._scalars_on(image_tokens.device)
        measure_only = config.alpha == 0
        guided, similarity, pushed = guide_tokens(
            image_tokens,
            config.reference,
            alpha=alpha,
            threshold=threshold,
            reference_mask=self._mask_on(grid, image_tokens.device),
            matching=config.matching,
            groups=step.groups,
            combine=config.combine,
            dropout=config.dropout,
            generator=self._generator_on(image_tokens.device),
            inplace=inplace and not measure_only,
            backend=config.backend,
        )
        statistics = self._statistics.get(block)
        if statistics is None:
            statistics = self._statistics[block] = _BlockStatistics(image_tokens.device)
        statistics.add(similarity, pushed, threshold, grid)
        return image_tokens if measure_only else guided

    def summary(self) -> GuidanceSummary:
        """Reads the statistics from the device; the only call that waits for it."""
        rows = tuple(self._rows())
        return GuidanceSummary(rows, self._forwards, self._guided, self._groups)

    def _includes_block(self, block: str) -> bool:
        if block not in self._included:
            self._included[block] = self.config.includes_block(block)
        return self._included[block]

    def _rows(self) -> Iterator[BlockRow]:
        for block, statistics in self._statistics.items():
            yield statistics.row(block)

    def _scalars_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._scalars:
            values = (self.config.alpha, self.config.threshold)
            with torch.inference_mode(False):
                alpha, threshold = torch.tensor(values, dtype=torch.float32).to(device).unbind()
            self._scalars[device] = (alpha, threshold)
        return self._scalars[device]

    def _mask_on(self, grid: Grid | None, device: torch.device) -> torch.Tensor | None:
        if self.reference_mask is None:
            return None
        if grid is None:
            raise ValueError("a reference mask needs the token grid of the block, (height, width)")
        return self.reference_mask(grid).to(device)

    def _generator_on(self, device: torch.device) -> torch.Generator | None:
        if self.config.dropout == 0:
            return None
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.config.seed)
        return self._generators[device]

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=3)


def read_timestep(timestep: float | torch.Tensor) -> tuple[float, float]:
    """A timestep as a float, and its rounding on a scale of 1000.

    A tensor (B,) is read by its first element. One of two or more dimensions holds a time for each
    token or frame, 0 for those that are given (image-to-video), and is read by its maximum.

    bf16 keeps 8 bits: the 0.9 that a FLUX model is given is 0.8984, a timestep of 898.4.
    """
    if not isinstance(timestep, torch.Tensor):
        return float(timestep), 0.0
    given = timestep.detach()
    value = float((given.amax() if given.ndim > 1 else given.reshape(-1)[0]).item())
    rounding = torch.finfo(timestep.dtype).eps * 1000 if timestep.is_floating_point() else 0.0
    return value, rounding
