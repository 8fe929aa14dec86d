"""`Guidance`: the state of a guided run, for any model and any sampling loop that torch can run.

A loop makes three calls: `begin_step` before each forward of its model, `apply` on the image tokens
of each attention output, `end_step` after the forward. References from outside of the batch need
one more forward first, inside of `record`.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .arguments import check_tokens
from .config import Grid, NegToMeConfig, ReferenceSettings, check_references
from .device_settings import DeviceSettings
from .functional import guide_tokens
from .guidance_step import GuidanceStep, ShardedTokens, read_timestep
from .ops import BACKEND_VARIABLE
from .statistics import (
    MAX_STEP_TOKENS,
    BlockRow,
    CallMatches,
    GuidanceSummary,
    RankCounts,
    Statistics,
    notes_on,
    sum_over_ranks,
)
from .thread_state import PerThread, ThreadState
from .window_watch import WindowWatch

__all__ = ["BlockRow", "Grid", "Guidance", "GuidanceSummary", "ReferenceSettings"]

_statistics_lock = threading.Lock()


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

    With references from outside of the batch, every item is pushed away from these instead, and
    their own noisy latents go through the model first:

    ```python
    guidance = Guidance(config, references=[ReferenceSettings(alpha=1.5)])
    ...
        if guidance.begin_step(t):
            with guidance.record():
                model(noisy_reference, t)
    ```

    Args:
        config: the settings; `NegToMeConfig()` if None. Its `placement` is not used: the caller
            chooses where to call `apply`. Its `groups`, if set, overrides that of `begin_step`
            within each part.
        references: one entry for each reference from outside of the batch. If there are any, the
            configuration's `reference` is not used.

    Attributes:
        watch: notices runs that never reach the window.
        reference_mask: None, or a function from a block's (height, width) to bool
            (height * width,): the tokens of in-batch references that may be matched, or with
            `matching="official"` the tokens that may move.
    """

    _step = PerThread[GuidanceStep | None](None)
    _generators = PerThread[dict[torch.device, torch.Generator] | None](None)

    def __init__(
        self, config: NegToMeConfig | None = None, references: Sequence[ReferenceSettings] = ()
    ) -> None:
        if config is None:
            config = NegToMeConfig()
        self.references = check_references(references)
        self.configure(config)
        self._thread_state = ThreadState()
        self._warned: set[str] = set()
        self.watch = WindowWatch()
        self.reference_mask: Callable[[Grid], Tensor] | None = None
        self.reset()

    def configure(self, config: NegToMeConfig) -> None:
        """Changes the settings from the next step on; the statistics stay."""
        if not isinstance(config, NegToMeConfig):
            raise TypeError(f"config must be a NegToMeConfig, not {type(config).__name__}")
        self.config = config
        self._settings = DeviceSettings(config, self.references)
        self._included: dict[str, bool] = {}

    def reset(self) -> None:
        """Forgets the statistics."""
        self._statistics = Statistics()
        self._forwards = 0
        self._guided = 0
        self._measured = 0
        self._groups: int | None = None
        self._notes: dict[str, int] = {}
        self.watch.first_timestep = None
        self._parts = 1

    def begin_run(self, *, goes_on: bool = False) -> None:
        """Restarts the dropout's random numbers, so that equal runs give equal results.

        Each warning is given once per run.

        Args:
            goes_on: the steps of the run before go on, with new random numbers.
        """
        if not goes_on:
            self.say(self.watch.begin(self.config))
        self._generators = None
        self._warned.clear()

    def begin_step(
        self,
        timestep: float | Tensor | None = None,
        *,
        step: int | None = None,
        num_steps: int | None = None,
        parts: int = 1,
        groups: int = 1,
        order: Tensor | None = None,
        grid: Grid | None = None,
        tolerance: float | None = None,
    ) -> bool:
        """Opens a forward of the model and returns True if it lies in the window.

        Args:
            timestep: in the scheduler's unit, 1000 (noise) to 0. A tensor is read once, here: its
                first element, or its maximum if it has two or more dimensions (a time for each
                token). May be None if the configuration has `steps` or `first_steps`.
            step, num_steps: index of the step from 0, and number of steps of the run; needed if
                the configuration has `steps`, and `step` if it has `first_steps`.
            parts: guidance parts of the batch, equal and contiguous; 2 where unconditional and
                conditional halves are concatenated. They never see each other.
            groups: equal contiguous groups of images in each part, which never see each other;
                2 for two prompts. The configuration's `groups`, if set, overrides it.
            order: int64 (B,), the items of the batch, group by group and part by part, if parts or
                groups are not contiguous.
            grid: (height, width) of the image tokens, needed if the configuration has `min_grid`;
                `apply` may name another for its block.
            tolerance: rounding error of `timestep`, in timesteps; if None, that of a tensor's
                dtype.
        """
        if timestep is not None:
            timestep, rounding = read_timestep(timestep)
            tolerance = rounding if tolerance is None else tolerance
        slack = 0.0 if tolerance is None else tolerance
        active = self.config.includes_step(timestep, step, num_steps, slack)
        groups = parts * (self.config.groups or groups)
        if self._step is not None:  # nobody closed it
            self._count_matches(self._step)
        # Read here and not in every block, because reading the environment is slow.
        torch_on_cpu = self.config.backend == "auto" and not os.environ.get(BACKEND_VARIABLE)
        self._step = GuidanceStep(active, groups, grid, torch_on_cpu, parts, order)
        with _statistics_lock:
            self._forwards += 1
            if active:
                self._guided += 1
                self._measured += not any(self._settings.alphas)
                self._groups, self._parts = groups, parts
        watch = self.watch
        self.say(watch.notice(self.config, timestep, step, num_steps, slack, active))
        return active

    def end_step(self, *, completed: bool = True) -> None:
        """Closes the forward; may be called at any time, with completed=False after an error."""
        step, self._step = self._step, None
        if step is None or not step.active:
            return
        self._count_matches(step)
        if not completed:
            return
        if step.shares and step.shards is not None:
            # All ranks are here; one rank alone may read the summary.
            totals = sum_over_ranks(step.shares, step.shards.sum)
            with _statistics_lock:
                self._statistics.add(*totals)
        if step.guided_blocks:
            return
        self._warn(step.why_unguided(self.config))

    @property
    def active(self) -> bool:
        """True while a forward inside the window is open."""
        return self._step is not None and self._step.active

    @property
    def recording(self) -> bool:
        """True while the forward of references is running."""
        return self._step is not None and self._step.recording is not None

    @property
    def groups(self) -> int:
        """Number of guidance groups of the open step, over all parts."""
        return self._step.groups if self._step is not None else 1

    @contextmanager
    def record(self, first: int = 0, count: int | None = None) -> Iterator[None]:
        """Records the references: inside, `apply` keeps the tokens and returns them unchanged.

        Enter it after `begin_step` and before the forward that is guided. The batch of the forward
        inside is groups * count items, groups counted over all parts: the references in the
        conditioning of the first group, then in that of the second, and so on. `end_step` drops the
        tokens.

        Args:
            first, count: which references this forward holds; if count is None, all from `first`
                on.

        Raises:
            RuntimeError: no step inside the window is open, or there are no references.
        """
        step = self._step
        if step is None or not step.active or not self.references:
            raise RuntimeError(
                "record needs references, Guidance(config, references=[...]), and an open step "
                "inside the window: call it where begin_step returned True"
            )
        step.recording = slice(first, len(self.references) if count is None else first + count)
        step.calls = {}
        try:
            yield
            step.recorded += step.recording.stop - first
        finally:
            step.recording = None

    def apply(
        self,
        image_tokens: Tensor,
        *,
        block: str = "block",
        grid: Grid | None = None,
        inplace: bool = False,
        shards: ShardedTokens | None = None,
        branches: int = 1,
    ) -> Tensor:
        """Returns the guided tokens, or the argument itself if nothing is to be done.

        Args:
            image_tokens: (B, N, D), any strides, the image tokens of one block.
            block: the block's name, for the filter and the statistics.
            grid: (height, width) with N = height * width, if it differs from the step's.
            inplace: write into `image_tokens`, which no other code may then hold.
            shards: how the tokens are distributed, if this rank holds only `image_tokens` of them.
                All ranks must make the same calls; the summary of each counts all tokens.
            branches: how often the batch holds all items of the step, one copy after the other, as
                in negative attention guidance. The branches never see each other.

        Raises:
            RuntimeError: no step is open; the references were not recorded in it; or a program is
                exported, which cannot hold the state of a guidance.
            ValueError, TypeError: as `negtome`; and if `min_grid` or a mask is set and no grid is
                known, or a mask leaves no token of this grid.
        """
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "a Guidance cannot be exported: its window and statistics live outside of the "
                "program; call negtome in the model, with alpha as an input of it"
            )
        step = self._step
        if step is None:
            raise RuntimeError("apply outside of a step; call begin_step before the forward")
        if not step.active:
            return image_tokens
        if not isinstance(image_tokens, Tensor) or image_tokens.ndim != 3:
            check_tokens(image_tokens, "image_tokens")
        grid = grid or step.grid
        included = self._includes_block(block) and self.config.includes_grid(grid)
        step.branches = branches
        if step.recording is not None:
            if included:
                step.keep_reference(image_tokens, block, len(self.references))
            return image_tokens
        if not included:
            step.skipped_blocks += 1
            return image_tokens
        step.guided_blocks += 1
        guide = self._apply_references if self.references else self._apply_batch
        if step.order is None:
            return guide(step, image_tokens, block, grid, inplace, shards)
        grouped = step.in_groups(image_tokens)
        guided = guide(step, grouped, block, grid, False, shards)
        return image_tokens if guided is grouped else step.in_batch(guided)

    def _apply_batch(
        self,
        step: GuidanceStep,
        image_tokens: Tensor,
        block: str,
        grid: Grid | None,
        inplace: bool,
        shards: ShardedTokens | None,
    ) -> Tensor:
        """Guides items by others of their group."""
        config = self.config
        several = step.groups > step.parts
        if (several or config.reference == "first") and step.only_references(len(image_tokens)):
            items, advice = step.lone_items(len(image_tokens))
            if config.reference == "others":
                raise ValueError(f'{items} has no others for reference="others"; {advice}')
            self._warn(
                f"{items} has only reference items, so nothing is pushed; {advice}", stacklevel=4
            )
            return image_tokens
        alpha, threshold = self._settings.scalars_on(image_tokens.device)
        measure_only = not any(self._settings.alphas)
        guide = guide_tokens if shards is None else shards.guide_tokens
        guided, similarity, pushed = guide(
            image_tokens,
            config.reference,
            alpha=alpha,
            threshold=threshold,
            reference_mask=self._mask_on(grid, image_tokens.device),
            matching=config.matching,
            groups=step.block_groups,
            combine=config.combine,
            dropout=config.dropout,
            generator=self._generator_on(image_tokens.device),
            inplace=inplace and not measure_only,
            backend="torch" if step.torch_on_cpu and image_tokens.is_cpu else config.backend,
        )
        moved = self._settings.moved(pushed, image_tokens.shape[1])
        matches = CallMatches(block, grid, similarity, moved, threshold, None)
        self._keep_matches(step, matches, shards)
        return image_tokens if measure_only else guided

    def _apply_references(
        self,
        step: GuidanceStep,
        image_tokens: Tensor,
        block: str,
        grid: Grid | None,
        inplace: bool,
        shards: ShardedTokens | None,
    ) -> Tensor:
        """Guides each group (B / block_groups, N, D) by the references' tokens (R, M, D).

        The references of a group were recorded in its conditioning.
        """
        references = step.take_reference(block, len(self.references))
        if shards is not None:
            references = shards.gather(references.flatten(0, 1)).unflatten(0, references.shape[:2])
        groups = step.block_groups
        if image_tokens.shape[0] % groups:
            raise ValueError(
                f"the batch of {image_tokens.shape[0]} items does not divide into {groups} equal "
                "groups"
            )
        config = self.config
        alpha, threshold = self._settings.scalars_on(image_tokens.device)
        measure_only = not any(self._settings.alphas)
        settings: dict[str, Any] = {
            "alpha": alpha,
            "threshold": threshold,
            "reference_mask": self._settings.reference_masks_on(references, block, grid),
            "matching": config.matching,
            "combine": config.combine,
            "backend": config.backend,
        }
        guide = guide_tokens if shards is None else shards.guide_tokens
        several_thresholds = config.combine == "nearest" and threshold.ndim > 0
        parts, matches_of_all = [], []
        for part, reference in zip(image_tokens.chunk(groups), references, strict=True):
            if several_thresholds and config.dropout > 0:
                # A spared token does not tell which reference, and so which threshold, it met.
                matches_of_all.append(guide(part, reference, **settings)[2])
            parts.append(
                guide(
                    part,
                    reference,
                    dropout=config.dropout,
                    generator=self._generator_on(image_tokens.device),
                    inplace=inplace and not measure_only,
                    **settings,
                )
            )
        images, similarity, pushed = (_concatenated(column) for column in zip(*parts, strict=True))
        exceeded: Tensor | None = None
        if several_thresholds:
            found = _concatenated(matches_of_all) if matches_of_all else pushed
            exceeded = (found >= 0).any(dim=1)
        moved = self._settings.moved(pushed, references.shape[2])
        matches = CallMatches(block, grid, similarity, moved, threshold, exceeded)
        self._keep_matches(step, matches, shards)
        return image_tokens if inplace or measure_only else images

    def summary(self) -> GuidanceSummary:
        """Reads the statistics from the device; the only call that waits for it."""
        if self._step is not None:
            self._count_matches(self._step)
        with _statistics_lock:
            rows = self._statistics.rows()
            notes = tuple(self._notes)
            if not any("identical" in note for note in notes):
                notes += notes_on(rows)
            return GuidanceSummary(
                rows,
                self._forwards,
                self._guided,
                self._groups,
                self._measured,
                self.watch.first_timestep,
                self.config.window,
                notes,
                self._parts,
            )

    def end_run(self, *, certain: bool = True) -> None:
        """Says it if the run that is over never reached the window; may be called at any time.

        Args:
            certain: the run is over. Otherwise only a run whose steps are known is judged.
        """
        self.say(self.watch.end(certain=certain))

    def note(self, text: str, times: int = 1) -> None:
        """Adds a sentence to the summary; with times=-1, takes it back."""
        with _statistics_lock:
            self._notes[text] = self._notes.get(text, 0) + times
            if self._notes[text] <= 0:
                del self._notes[text]

    def say(self, message: str | None) -> None:
        """Warns of something and notes it in the summary; does nothing if it is None."""
        if message is not None:
            self._warn(message, stacklevel=4)

    def _keep_matches(
        self, step: GuidanceStep, matches: CallMatches, shards: ShardedTokens | None
    ) -> None:
        with _statistics_lock:
            self._statistics.notice(matches.block, matches.grid)
        if shards is not None:
            step.shares.append(RankCounts.of(matches))
            step.shards = shards
            return
        step.matches.append(matches)
        step.kept_tokens += matches.similarity.numel()
        if step.kept_tokens > MAX_STEP_TOKENS:
            self._count_matches(step)

    def _count_matches(self, step: GuidanceStep) -> None:
        """Hands what this step has found to the statistics."""
        with _statistics_lock:
            self._statistics.keep(step.matches, step.kept_tokens)
        step.matches, step.kept_tokens = [], 0

    def _mask_on(self, grid: Grid | None, device: torch.device) -> Tensor | None:
        if self.reference_mask is None:
            return None
        if grid is None:
            raise ValueError("a reference mask needs the token grid of the block, (height, width)")
        return self.reference_mask(grid).to(device)

    def _includes_block(self, block: str) -> bool:
        if block not in self._included:
            self._included[block] = self.config.includes_block(block)
        return self._included[block]

    def _generator_on(self, device: torch.device) -> torch.Generator | None:
        if self.config.dropout == 0:
            return None
        generators = self._generators
        if generators is None:
            generators = self._generators = {}
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(self.config.seed)
        return generators[device]

    def _warn(self, message: str, stacklevel: int = 3) -> None:
        if message not in self._warned:
            self._warned.add(message)
            self.note(message)
            warnings.warn(message, UserWarning, stacklevel=stacklevel)


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
