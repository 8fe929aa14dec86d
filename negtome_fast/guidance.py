"""The state of a guided run that every stack shares: window, groups, block filter, statistics.

Needs torch only. A sampling loop makes three calls: `begin_step` once per forward of its model,
`apply` on the image tokens of each attention output, `end_step` after the forward. References
from outside of the batch take a forward of their own first, inside of `record`.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from .arguments import mark_checked
from .config import NegToMeConfig
from .functional import guide_tokens
from .ops import BACKEND_VARIABLE
from .statistics import SEEN_TOKENS, BlockRow, Grid, GuidanceSummary, Seen, Statistics, sums_of

if TYPE_CHECKING:
    from .pipelines.parallel import TokenShards

__all__ = ["BlockRow", "Grid", "Guidance", "GuidanceSummary", "ReferenceSettings"]

T = TypeVar("T")
_counting = threading.Lock()


class ThreadState(threading.local):
    """What `PerThread` attributes of one object hold; a copy of it holds nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class PerThread(Generic[T]):
    """An attribute that each thread has its own of: threads may be in different steps.

    Its object has a `_here`.
    """

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, _: type | None = None) -> T:
        value: T = getattr(owner._here, self._name, self._default)
        return value

    def __set__(self, owner: Any, value: T) -> None:
        setattr(owner._here, self._name, value)


@dataclass(frozen=True)
class ReferenceSettings:
    """How a reference from outside of the batch is used.

    Attributes:
        alpha: push strength; positive pushes away from this reference, negative pulls toward it.
            None: the configuration's.
        threshold: cosine similarity, -1 to 1, that a match must exceed. None: the configuration's.
        mask: bool (H, W), or (F, H, W) for the frames of a video, of any size: where the reference
            may be matched. It is stretched to the grid of each block, whose tokens may be matched
            where at least half of their area is True.
    """

    alpha: float | None = None
    threshold: float | None = None
    mask: torch.Tensor | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("alpha", "threshold")}
        NegToMeConfig(**{name: value for name, value in given.items() if value is not None})
        if self.mask is None:
            return
        if not isinstance(self.mask, torch.Tensor) or self.mask.dtype != torch.bool:
            raise TypeError("the mask of a reference must be a bool tensor (H, W) or (F, H, W)")
        if self.mask.ndim not in (2, 3) or not self.mask.any():
            raise ValueError(
                "the mask of a reference must be (H, W) or (F, H, W) and True somewhere; this one "
                f"is {tuple(self.mask.shape)} with {int(self.mask.sum())} True"
            )


@dataclass
class _Share:
    """What one rank counted in a block whose tokens are distributed over several."""

    block: str
    counts: torch.Tensor
    similarity: torch.Tensor
    shards: TokenShards


@dataclass
class _Step:
    active: bool
    groups: int
    grid: Grid | None
    guided_blocks: int = 0
    skipped_blocks: int = 0
    # Of references from outside: the numbers of those whose forward is going on, how many are
    # through, and by block, in the order of its calls, the tokens (groups, R, M, D).
    recording: slice | None = None
    recorded: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    kept: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    shares: list[_Share] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    seen_tokens: int = 0
    torch_on_cpu: bool = False


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
        config: the settings; `NegToMeConfig()` if None. Its `placement` is where the caller
            calls `apply`, and its `groups`, if set, goes before that of `begin_step`.
        references: one entry for each reference from outside of the batch. Where there are any,
            the configuration's `reference` is not used.

    Attributes:
        reference_mask: None, or a function from a block's (height, width) to bool
            (height * width,): the tokens of in-batch references that may be matched, or with
            `matching="official"` the tokens that may move.
    """

    _step = PerThread[_Step | None](None)
    _generators = PerThread[dict[torch.device, torch.Generator] | None](None)

    def __init__(
        self, config: NegToMeConfig | None = None, references: Sequence[ReferenceSettings] = ()
    ) -> None:
        if config is None:
            config = NegToMeConfig()
        if not isinstance(config, NegToMeConfig):
            raise TypeError(f"config must be a NegToMeConfig, not {type(config).__name__}")
        self.references = tuple(references)
        self.configure(config)
        self._masks: dict[tuple[int, Grid, torch.device], torch.Tensor] = {}
        self._here = ThreadState()
        self._warned: set[str] = set()
        self.reference_mask: Callable[[Grid], torch.Tensor] | None = None
        self.reset()

    def configure(self, config: NegToMeConfig) -> None:
        """Other settings from the next step on; the statistics stay."""
        self.config = config
        self._alphas = self._setting("alpha")
        self._thresholds = self._setting("threshold")
        self._scalars: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._included: dict[str, bool] = {}

    def reset(self) -> None:
        """Forgets the statistics."""
        self._statistics = Statistics()
        self._forwards = 0
        self._guided = 0
        self._groups: int | None = None

    def begin_run(self) -> None:
        """Starts the dropout's random numbers anew, so that an equal run gives equal results.

        Each warning is given once per run.
        """
        self._generators = None
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
        if self._step is not None:  # one that nobody closed
            self._count_seen(self._step)
        opened = _Step(active, groups, grid)
        # Not for every block: the environment is slow to read.
        opened.torch_on_cpu = self.config.backend == "auto" and not os.environ.get(BACKEND_VARIABLE)
        self._step = opened
        with _counting:
            self._forwards += 1
            if active:
                self._guided += 1
                self._groups = groups
        return active

    def end_step(self, *, completed: bool = True) -> None:
        """Closes the forward; may be called at any time, with completed=False after an error."""
        step, self._step = self._step, None
        if step is None or not step.active:
            return
        self._count_seen(step)
        if not completed:
            return
        self._sum_over_ranks(step.shares)
        if step.guided_blocks:
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

    @property
    def recording(self) -> bool:
        """Whether the forward of references is going on."""
        return self._step is not None and self._step.recording is not None

    @property
    def groups(self) -> int:
        """Guidance groups of the open step."""
        return self._step.groups if self._step is not None else 1

    @contextmanager
    def record(self, first: int = 0, count: int | None = None) -> Iterator[None]:
        """The forward inside is that of the references: `apply` keeps its tokens, changes nothing.

        To be entered after `begin_step`, before the forward that is guided. The batch of the
        forward inside is groups * count items: the references in the conditioning of the first
        group, then in that of the second, and so on. The tokens are dropped in `end_step`.

        Args:
            first, count: which references, where one forward does not take all of them; all
                remaining if None.

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
        image_tokens: torch.Tensor,
        *,
        block: str = "block",
        grid: Grid | None = None,
        inplace: bool = False,
        shards: TokenShards | None = None,
    ) -> torch.Tensor:
        """The guided tokens; the argument itself where nothing is to be done.

        Args:
            image_tokens: (B, N, D), any strides, the image tokens of one block.
            block: the block's name, for the filter and the statistics.
            grid: (height, width) with N = height * width, if not that of the step.
            inplace: write into `image_tokens`, which then must be nobody else's.
            shards: where the tokens are distributed over several ranks, of which this one has
                `image_tokens`. All ranks must make the same calls; each one's summary is of all.

        Raises:
            RuntimeError: no step is open; or the references were not recorded in it; or a program
                is exported, in which the state of a guidance has no place.
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
        grid = grid or step.grid
        included = self._includes_block(block) and self.config.includes_grid(grid)
        if step.recording is not None:
            if included:
                self._keep(step, image_tokens, block)
            return image_tokens
        if not included:
            step.skipped_blocks += 1
            return image_tokens
        step.guided_blocks += 1
        config = self.config
        if self.references:
            return self._apply_references(step, image_tokens, block, grid, inplace, shards)
        if config.reference == "first" and image_tokens.shape[0] == step.groups:
            self._warn(
                f"a batch of {step.groups} in {step.groups} group(s) has only reference items, so "
                "nothing is pushed; generate at least two images, or use reference='others'"
            )
            return image_tokens
        alpha, threshold = self._scalars_on(image_tokens.device)
        measure_only = config.alpha == 0
        guide = guide_tokens if shards is None else shards.guide_tokens
        guided, similarity, pushed = guide(
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
            backend="torch" if step.torch_on_cpu and image_tokens.is_cpu else config.backend,
        )
        self._count(step, shards, block, grid, similarity, pushed, threshold)
        return image_tokens if measure_only else guided

    def _count(
        self,
        step: _Step,
        shards: TokenShards | None,
        block: str,
        grid: Grid | None,
        similarity: torch.Tensor,
        pushed: torch.Tensor,
        threshold: torch.Tensor,
        matched: torch.Tensor | None = None,
    ) -> None:
        seen = Seen(block, grid, similarity, pushed, threshold, matched)
        with _counting:
            self._statistics.notice(block, grid)
        if shards is not None:
            counts, total = sums_of([seen])
            step.shares.append(_Share(block, counts[0], total[0], shards))
            return
        step.seen.append(seen)
        step.seen_tokens += similarity.numel()
        if step.seen_tokens > SEEN_TOKENS:
            self._count_seen(step)

    def _count_seen(self, step: _Step) -> None:
        """Hands what this step has found to the statistics."""
        with _counting:
            self._statistics.keep(step.seen, step.seen_tokens)
        step.seen, step.seen_tokens = [], 0

    def _keep(self, step: _Step, image_tokens: torch.Tensor, block: str) -> None:
        which, groups = step.recording, step.groups
        assert which is not None
        count = which.stop - which.start
        if image_tokens.shape[0] != groups * count:
            raise ValueError(
                f"the forward of {count} references in {groups} guidance groups needs a batch of "
                f"{groups * count}; the tokens of {block} are {tuple(image_tokens.shape)}"
            )
        kept, call = step.kept.setdefault(block, []), step.calls.get(block, 0)
        step.calls[block] = call + 1
        if call == len(kept):
            shape = (groups, len(self.references), *image_tokens.shape[1:])
            kept.append(image_tokens.new_empty(shape))
        kept[call][:, which] = image_tokens.detach().unflatten(0, (groups, count))

    def _apply_references(
        self,
        step: _Step,
        image_tokens: torch.Tensor,
        block: str,
        grid: Grid | None,
        inplace: bool,
        shards: TokenShards | None,
    ) -> torch.Tensor:
        """Each group (B / groups, N, D) with the references' tokens (R, M, D) in its conditioning.

        A call of a block takes the tokens that the same call of the references' forward left.
        """
        if step.recorded < len(self.references) or not step.kept.get(block):
            raise RuntimeError(
                f"no tokens of the references were recorded for {block} in this step; run the "
                "model on the references inside of `with guidance.record():` first"
            )
        references = step.kept[block].pop(0)
        if shards is not None:
            references = shards.gather(references.flatten(0, 1)).unflatten(0, references.shape[:2])
        if image_tokens.shape[0] % step.groups:
            raise ValueError(
                f"the batch of {image_tokens.shape[0]} items does not divide into {step.groups} "
                "equal groups"
            )
        config = self.config
        alpha, threshold = self._scalars_on(image_tokens.device)
        mask = self._masks_on(references, block, grid)
        measure_only = not any(self._alphas)
        settings: dict[str, Any] = {
            "alpha": alpha,
            "threshold": threshold,
            "reference_mask": mask,
            "matching": config.matching,
            "combine": config.combine,
            "backend": config.backend,
        }
        guide = guide_tokens if shards is None else shards.guide_tokens
        parts, matched = [], []
        for part, reference in zip(image_tokens.chunk(step.groups), references, strict=True):
            if config.combine == "nearest" and threshold.ndim and config.dropout > 0:
                # What dropout spares does not tell which reference, and so which threshold, it met.
                matched.append(guide(part, reference, **settings)[2])
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
        images, similarities, pushes = (_joined(column) for column in zip(*parts, strict=True))
        told: torch.Tensor | None = None
        if config.combine == "nearest" and threshold.ndim:
            told = ((_joined(matched) if matched else pushes) >= 0).any(dim=1)
        self._count(step, shards, block, grid, similarities, pushes, threshold, told)
        return image_tokens if inplace or measure_only else images

    def _masks_on(
        self, references: torch.Tensor, block: str, grid: Grid | None
    ) -> torch.Tensor | None:
        """The references' masks (R, M) on the tokens of this grid; None where there are none."""
        if all(reference.mask is None for reference in self.references):
            return None
        tokens = references.shape[-2]
        if grid is None or tokens % (grid[0] * grid[1]):
            raise ValueError(
                f"a reference has a mask, but the token grid of {block} is not known; pass "
                "grid=(height, width), or use references without masks"
            )
        key = (tokens, grid, references.device)
        if key not in self._masks:
            frames = tokens // (grid[0] * grid[1])
            with torch.inference_mode(False):
                masks = [_mask_on_grid(r.mask, (frames, *grid)) for r in self.references]
                for number, mask in enumerate(masks):
                    if not mask.any():
                        raise ValueError(
                            f"the mask of reference {number} leaves no token of {block}, which "
                            f"has {grid[0]} x {grid[1]}: white covers less than half of each. Use "
                            "a larger region, or leave small grids out with min_grid"
                        )
                self._masks[key] = torch.stack(masks).to(references.device)
        return self._masks[key]

    def summary(self) -> GuidanceSummary:
        """Reads the statistics from the device; the only call that waits for it."""
        if self._step is not None:
            self._count_seen(self._step)
        with _counting:
            rows = self._statistics.rows()
        return GuidanceSummary(rows, self._forwards, self._guided, self._groups)

    def _sum_over_ranks(self, shares: list[_Share]) -> None:
        """Adds what all ranks counted in this forward, in one exchange for all blocks.

        Here and not when the summary is read, which one rank may do alone.
        """
        if not shares:
            return
        rows = [torch.cat([one.counts.double(), one.similarity.double()[None]]) for one in shares]
        totals = shares[0].shards.sum(torch.stack(rows))
        counts, similarity = totals[:, :3].to(torch.int64), totals[:, 3].float()
        with _counting:
            self._statistics.add(tuple(one.block for one in shares), counts, similarity)

    def _includes_block(self, block: str) -> bool:
        if block not in self._included:
            self._included[block] = self.config.includes_block(block)
        return self._included[block]

    def _setting(self, name: str) -> tuple[float, ...]:
        """The configuration's alpha or threshold, or that of each reference."""
        default = getattr(self.config, name)
        if not self.references:
            return (default,)
        given = [getattr(reference, name) for reference in self.references]
        return tuple(default if value is None else value for value in given)

    def _scalars_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Alpha and threshold: one number, or one for each reference where they differ."""
        if device not in self._scalars:
            with torch.inference_mode(False):
                alpha, threshold = (
                    mark_checked(
                        torch.tensor(
                            v[0] if len(set(v)) == 1 else v, dtype=torch.float32, device=device
                        )
                    )
                    for v in (self._alphas, self._thresholds)
                )
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
        generators = self._generators
        if generators is None:
            generators = self._generators = {}
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(self.config.seed)
        return generators[device]

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=3)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _mask_on_grid(mask: torch.Tensor | None, size: tuple[int, int, int]) -> torch.Tensor:
    """A mask as bool (frames * height * width,): True where at least half of a token is."""
    if mask is None:
        return torch.ones(size, dtype=torch.bool, device="cpu").flatten()
    pixels = mask.detach().cpu().float().reshape(1, -1, *mask.shape[-2:])
    return (torch.nn.functional.adaptive_avg_pool3d(pixels, size) >= 0.5).flatten()


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
