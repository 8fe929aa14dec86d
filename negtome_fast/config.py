"""Settings of the guidance: what is pushed, how strongly, in which steps and in which blocks.

A configuration is an immutable value, checked when it is made, that can be stored as JSON. It knows
nothing about models; `Guidance` and the pipelines read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any, Literal

import torch

Grid = tuple[int, int]
"""(height, width) of a block's image tokens."""

NOISE = 1000.0
"""The scheduler's timestep of pure noise."""

_ROUNDING = 1e-3
"""Slack at both ends of the window, in timesteps: flow schedulers give 899.99994 for 900."""

_LARGEST = torch.finfo(torch.float32).max

_CHOICES = {
    "reference": ("first", "others"),
    "matching": ("paper", "official"),
    "combine": ("nearest", "sum"),
    "placement": ("output", "pre_projection"),
    "backend": ("auto", "triton", "torch", "reference"),
}

_PRESETS: dict[str, dict[str, Any]] = {
    "flux": {"alpha": 0.9, "threshold": 0.65, "t_start": NOISE, "t_end": 900.0},
    "sdxl": {
        "alpha": 0.9,
        "threshold": 0.7,
        "t_start": NOISE,
        "t_end": 800.0,
        "blocks": ("up_blocks",),
        "min_grid": (32, 32),
    },
}
# The authors give no settings for SD 1.5, whose UNet has the architecture of SDXL's.
_PRESETS["sd15"] = _PRESETS["sdxl"]


@dataclass(frozen=True)
class NegToMeConfig:
    """Settings of the guidance. The defaults are the authors' for FLUX.1 (arXiv 2412.01339).

    Attributes:
        alpha: push strength; positive pushes away from the reference, negative pulls toward it,
            0 only measures (outputs stay bit-identical, statistics are kept). Authors: 0.9.
        threshold: cosine similarity, -1 to 1, that a match must exceed, strictly. Authors: 0.65
            for FLUX.1, 0.7 for SDXL.
        t_start, t_end: window of guided steps in the scheduler's timesteps, from 1000 (noise) down
            to 0 (image), both ends included. Authors: 1000 to 900 for FLUX.1, 1000 to 800 for SDXL.
        steps: window as fractions of the steps of a run, instead of t_start and t_end:
            `(0.0, 0.25)` guides the first quarter, the steps i of n with start <= i / n < end. Use
            it for few-step models, which may have no timestep in a narrow window.
        first_steps: window as a number of steps, instead of t_start and t_end: the first n steps of
            a run, whatever their timesteps, so it is reached in image-to-image too. Forwards of one
            step count once.
        reference: `"first"`: item 0 of every group is the reference and comes out bit-identical;
            `"others"`: every item is pushed away from all others of its group.
        matching: `"paper"`, or `"official"` for the index order of the authors' code.
        combine: `"nearest"`: the best match over all references; `"sum"`: the sum of all pushes.
            They differ only if an item has several references.
        dropout: probability, 0 to 1, that a matched token is spared. Authors: 0.
        seed: seed of the private generator that draws the dropout. Every run restarts it, and the
            pipeline's own random numbers are not touched.
        blocks: name or names of the attention modules to guide, kept as a tuple. None: all that
            the model's layout offers. A name with `*`, `?` or `[` is a pattern for the whole module
            name; any other matches whole dot-separated parts: `"up_blocks"`,
            `"transformer_blocks.3"`, `"attn1"`.
        exclude_blocks: names of modules to leave out, in the same notation.
        min_grid: smallest (height, width), in tokens, of a block that is guided. None: any.
            Authors: (32, 32) for SDXL, none for FLUX.1.
        placement: `"output"`: the output of the attention module; `"pre_projection"`: the input of
            its output projection, as in the authors' FLUX.1 code.
        groups: number of equal contiguous groups of images that never see each other. They are
            counted within each guidance part: the parts of a batch, such as the halves of
            concatenated classifier-free guidance, are always found and kept apart. None: one group
            for each prompt of a pipeline's call, and one in all for a bare model. 1: the images of
            all prompts are one group.
        backend: `"auto"` (Triton on a GPU, else torch), `"triton"`, `"torch"` or `"reference"`.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range.
    """

    alpha: float = 0.9
    threshold: float = 0.65
    t_start: float = NOISE
    t_end: float = 900.0
    steps: tuple[float, float] | None = None
    first_steps: int | None = None
    reference: Literal["first", "others"] = "first"
    matching: Literal["paper", "official"] = "paper"
    combine: Literal["nearest", "sum"] = "nearest"
    dropout: float = 0.0
    seed: int = 0
    blocks: Sequence[str] | None = None
    exclude_blocks: Sequence[str] = ()
    min_grid: tuple[int, int] | None = None
    placement: Literal["output", "pre_projection"] = "output"
    groups: int | None = None
    backend: Literal["auto", "triton", "torch", "reference"] = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            chosen = getattr(self, name)
            if not isinstance(chosen, str) or chosen not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, choices))}, not {chosen!r:.80}"
                )
        for name in ("alpha", "threshold", "t_start", "t_end", "dropout"):
            self._set(name, _real(name, getattr(self, name)))
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold is a cosine similarity, -1 to 1, not {self.threshold}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout is a probability, 0 to 1, not {self.dropout}")
        self._check_window()
        self._set("seed", _whole("seed", self.seed, at_least=0))
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, not {self.seed}")
        if self.groups is not None:
            self._set("groups", _whole("groups", self.groups, at_least=1))
        if self.min_grid is not None:
            height, width = _pair("min_grid", self.min_grid, "(height, width)")
            grid = (_whole("min_grid", height, at_least=1), _whole("min_grid", width, at_least=1))
            self._set("min_grid", grid)
        if self.blocks is not None:
            self._set("blocks", _names("blocks", self.blocks))
            if not self.blocks:
                raise ValueError("blocks is empty, so nothing would be guided; None means all")
        self._set("exclude_blocks", _names("exclude_blocks", self.exclude_blocks))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_window(self) -> None:
        for name in ("t_start", "t_end"):
            if not 0 <= getattr(self, name) <= NOISE:
                raise ValueError(
                    f"{name} is a scheduler timestep, 1000 (noise) to 0, not {getattr(self, name)}"
                )
        if self.t_start < self.t_end:
            raise ValueError(
                f"t_start={self.t_start:g} lies below t_end={self.t_end:g}; timesteps run from "
                "1000 (noise) down to 0, so exchange the two"
            )
        if self.steps is not None:
            start, end = (
                _real("steps=(start, end)", part)
                for part in _pair("steps", self.steps, "(start, end)")
            )
            if not 0 <= start < end <= 1:
                raise ValueError(
                    f"steps=(start, end) are fractions with 0 <= start < end <= 1, "
                    f"not ({start:g}, {end:g})"
                )
            self._set("steps", (start, end))
        if self.first_steps is not None:
            self._set("first_steps", _whole("first_steps", self.first_steps, at_least=1))
            if self.steps is not None:
                raise ValueError(
                    f"first_steps={self.first_steps} and steps={self.steps} are two ways to say "
                    "one thing; set one of them to None"
                )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> NegToMeConfig:
        """Returns the authors' settings for a family: `"flux"` or `"sdxl"`; `"sd15"` uses SDXL's.

        Matching and placement keep this package's defaults. The authors' code has
        `matching="official"` and, for FLUX, `placement="pre_projection"`.
        """
        if name not in _PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(map(repr, _PRESETS))}")
        return cls(**_PRESETS[name]).with_overrides(**overrides)

    def with_overrides(self, **overrides: Any) -> NegToMeConfig:
        """Returns a copy with some fields replaced; an unknown name is a `ValueError`."""
        _check_names(overrides)
        return replace(self, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values that JSON can hold.

        `first_steps` is left out where it is None, so that settings keep the identity that results
        of earlier versions were stored under.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.first_steps is None:
            del values["first_steps"]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NegToMeConfig:
        """Inverts `to_dict`; absent fields take their defaults, unknown ones are a `ValueError`."""
        _check_names(values)
        return cls(**values)

    @property
    def counts_steps(self) -> bool:
        """True if the window needs the index of a step, not its timestep."""
        return self.steps is not None or self.first_steps is not None

    @property
    def window(self) -> str:
        """The window in words, in the notation of the fields that set it."""
        if self.first_steps is not None:
            return f"first_steps={self.first_steps}"
        if self.steps is not None:
            return "steps=({:g}, {:g})".format(*self.steps)
        return f"t_start={self.t_start:g} to t_end={self.t_end:g}"

    def includes_block(self, block: str) -> bool:
        """Returns True if an attention module of this name passes `blocks` and `exclude_blocks`."""
        included = self.blocks is None or any(_matches(p, block) for p in self.blocks)
        return included and not any(_matches(p, block) for p in self.exclude_blocks)

    def includes_grid(self, grid: Grid | None) -> bool:
        """Returns True if a block with this (height, width) of tokens passes `min_grid`."""
        if self.min_grid is None:
            return True
        if grid is None:
            raise ValueError(
                f"min_grid={self.min_grid} is set, but the token grid of this block is not known; "
                "pass grid=(height, width), or use a configuration without min_grid"
            )
        try:
            height, width = grid
            return bool(height >= self.min_grid[0] and width >= self.min_grid[1])
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"grid must be (height, width), not {grid!r:.80}") from error

    def includes_step(
        self,
        timestep: float | None,
        step: int | None = None,
        num_steps: int | None = None,
        tolerance: float = 0.0,
    ) -> bool:
        """Returns True if a step lies in the window.

        Args:
            timestep: the scheduler's timestep, 1000 to 0; may be None if the window counts steps.
            step, num_steps: index of the step from 0, and number of steps of the run; needed if
                `steps` is set, and `step` if `first_steps` is.
            tolerance: rounding error of `timestep`, in timesteps.

        Raises:
            TypeError, ValueError: an argument that the window needs is missing, or is no number.
        """
        if self.first_steps is not None:
            if step is None:
                raise ValueError(
                    f"first_steps={self.first_steps} needs the index of the step; it is known to "
                    "a pipeline, and to begin_step(step=...)"
                )
            return step < self.first_steps
        if self.steps is not None:
            if step is None or num_steps is None:
                raise ValueError(
                    f"steps={self.steps} needs the index of the step and the number of steps; "
                    "they are known to a pipeline, and to begin_step(step=..., num_steps=...)"
                )
            done = as_number("step", step) / as_number("num_steps", num_steps, positive=True)
            return self.steps[0] - 1e-9 <= done < self.steps[1] - 1e-9
        if timestep is None:
            raise ValueError("a window in timesteps needs the timestep of the step")
        slack = as_number("tolerance", tolerance) + _ROUNDING
        return self.t_end - slack <= as_number("timestep", timestep) <= self.t_start + slack


@dataclass(frozen=True)
class ReferenceSettings:
    """Settings of a reference from outside of the batch.

    Attributes:
        alpha: push strength; positive pushes away from this reference, negative pulls toward it.
            None: the configuration's.
        threshold: cosine similarity, -1 to 1, that a match must exceed. None: the configuration's.
        mask: region of the reference that may be matched, bool (H, W), or (F, H, W) for the frames
            of a video, of any size. It is stretched to the grid of each block; a token may be
            matched if at least half of its area is True. None: all of it.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range, or the mask is empty.
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


def _matches(pattern: str, block: str) -> bool:
    if any(character in pattern for character in "*?["):
        return fnmatchcase(block, pattern)
    return f".{pattern}." in f".{block}."


def _check_names(values: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(NegToMeConfig)]
    unknown = [repr(name) for name in values if name not in known]
    if unknown:
        raise ValueError(f"unknown setting {', '.join(unknown)}; the settings are {known}")


def as_number(name: str, value: Any, positive: bool = False) -> float:
    """Return a number, also one in a tensor of one element, as a float."""
    try:
        number = float(value) if not isinstance(value, (bool, str, bytes)) else float("nan")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = float("nan")
    if number != number or (positive and number <= 0):
        kind = "a number above 0" if positive else "a number"
        raise ValueError(f"{name} must be {kind}, not {type(value).__name__} {value!r:.80}")
    return number


def check_references(references: Any) -> tuple[ReferenceSettings, ...]:
    """Return the references of a guidance; raises `TypeError` if it is anything else."""
    one = isinstance(references, (str, bytes)) or not isinstance(references, Sequence)
    if one or not all(isinstance(entry, ReferenceSettings) for entry in references):
        kind = type(references).__name__
        raise TypeError(f"references must be a sequence of ReferenceSettings, got {kind}")
    return tuple(references)


def _real(name: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"{name} must be a number, not {type(given).__name__}: {given!r}")
    value: Any = given
    if not value - value == 0:  # an integer may be too large for `math.isfinite`
        raise ValueError(f"{name} must be finite, not {value}")
    if abs(value) > _LARGEST:
        told = f"{value:g}" if isinstance(value, float) else f"{len(str(abs(value)))} digits"
        raise ValueError(f"{name} must be at most {_LARGEST:.4g}, the largest in fp32, not {told}")
    return float(value)


def _whole(name: str, value: Any, at_least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}: {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, not {value}")
    return int(value)


def _pair(name: str, value: Any, form: str) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be two values {form}, not {value!r}")
    return value[0], value[1]


def _names(name: str, value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (tuple, list)) or not all(isinstance(n, str) and n for n in names):
        raise TypeError(f"{name} must be names or patterns of modules, not {value!r}")
    return tuple(names)
