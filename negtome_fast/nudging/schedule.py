"""`NudgeSchedule`: how strongly, where and when `generate_with_nudging` moves latents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

from .call import Objective

Method = Literal["nudge", "negtome", "both", "reseed"]
MOST_STEPS = 1_000_000
"""Largest number of descent steps, and of points."""
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class NudgeSchedule:
    """Strength and window of the moves of latents; every failed attempt escalates.

    The paper (arXiv 2408.15450) publishes no values; these are this project's, found on the
    embedded model with desired points (docs/nudging.md).

    Attributes:
        objective: objective of `nudge`.
        alpha, beta: weights of the desired and the undesired points in the first retry.
        escalation: factor by which every further retry multiplies `alpha`, `beta`, `max_distance`
            and NegToMe's alpha; at least 1.
        max_distance: trust radius of a step, as a share of the norm of the latents.
        steps, step_size: descent steps and their size within one step of the scheduler.
        window: (start, end), fractions of the scheduler's steps between which latents are moved.
        extend: how much later the window ends in every further retry, at most at 1. A later end
            lets the model restore less of what it has memorised, but also clean up less.
        nearest: number of undesired and of desired points that steer an image.
        pool: number of nearest desired points from which `nearest` are drawn. They are drawn again
            in each attempt, by the image's own seed, so that the images of a prompt stay different.
    """

    objective: Objective = "cosine"
    alpha: float = 4.0
    beta: float = 2.0
    escalation: float = 1.5
    max_distance: float = 0.2
    steps: int = 5
    step_size: float = 0.05
    window: tuple[float, float] = (0.3, 0.7)
    extend: float = 0.125
    nearest: int = 1
    pool: int = 8

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise ValueError(
                f"objective must be one of {', '.join(get_args(Objective))}, got {self.objective!r}"
            )
        for name in ("alpha", "beta", "escalation", "max_distance", "step_size", "extend"):
            _check_real(name, getattr(self, name))
        for name in ("steps", "nearest", "pool"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be at least 1 and whole, got {value!r}")
            if value > MOST_STEPS:
                raise ValueError(f"{name} must be at most {MOST_STEPS}, got {value!r:.40}")
        if not isinstance(self.window, (tuple, list)) or len(self.window) != 2:
            raise TypeError(f"window must be two values (start, end), not {self.window!r}")
        for part in self.window:
            _check_real("window", part)
        start, end = self.window
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"window=(start, end) are fractions, 0 <= start < end <= 1, not {self.window}"
            )
        if not 0 <= self.extend <= 1:
            raise ValueError(f"extend is a fraction of the steps, 0 to 1, got {self.extend}")
        if not self.escalation >= 1:
            raise ValueError(f"escalation must be at least 1, got {self.escalation}")
        for name in ("max_distance", "step_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.pool < self.nearest:
            raise ValueError(
                f"pool must be at least nearest, {self.nearest}, to draw from, got {self.pool}"
            )

    def factor(self, attempt: int) -> float:
        """Factor of the weights in this attempt, at most 1e30; the first retry is attempt 1."""
        if (attempt - 1) * math.log10(self.escalation) > 30:  # fp32 ends at 3e38
            return 1e30
        return self.escalation ** (attempt - 1)

    def moves_after(self, step: int, steps: int, attempt: int) -> bool:
        """Return True if latents are moved after step number `step` (from 0) of `steps`."""
        start, end = self.window
        end = min(1.0, end + self.extend * (attempt - 1))
        # Sums of fractions are rounded: the last step of the window is part of it.
        return start - 1e-9 <= (step + 1) / steps <= end + 1e-9


def _check_real(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    # An infinite radius is no limit.
    if not math.isfinite(value) and not (name == "max_distance" and float(value) > 0):
        raise ValueError(f"{name} must be finite, got {value}")
