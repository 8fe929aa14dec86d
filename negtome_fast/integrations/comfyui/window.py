"""`Window`: the guided part of a run, in the units of the nodes, and what would fit a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

_STEP = 1000
"""Steps of the nodes' inputs `start` and `end` in a unit."""


@dataclass(frozen=True)
class Window:
    """The guided part of a run.

    Attributes:
        start, end: both ends, included. In percent, from 0 (noise) to 1 (image) as in ComfyUI's
            other nodes; or in sigmas, the higher one first.
        unit: `"percent"` or `"sigma"`.

    Raises:
        ValueError: the two are out of order or out of range.
    """

    start: float
    end: float
    unit: Literal["percent", "sigma"] = "percent"

    def __post_init__(self) -> None:
        if self.unit == "percent" and not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"a window in percent goes from 0 (noise) to 1 (image), so 0 <= start <= end <= 1, "
                f"not start={self.start:g}, end={self.end:g}"
            )
        if self.unit == "sigma" and not self.start >= self.end >= 0:
            raise ValueError(
                f"a window in sigmas goes from high (noise) to 0 (image), so start >= end >= 0, "
                f"not start={self.start:g}, end={self.end:g}"
            )

    def __str__(self) -> str:
        return f"{self.unit} {self.start:g} to {self.end:g}"

    def sigmas(self, model_sampling: Any) -> tuple[float, float]:
        """Returns the (highest, lowest) sigma of the window."""
        if self.unit == "sigma":
            return self.start, self.end
        highest, lowest = map(model_sampling.percent_to_sigma, (self.start, self.end))
        return float(highest), float(lowest)

    def for_run(self, sigmas: Sequence[float], model_sampling: Any) -> Window:
        """Returns a window of this unit that holds the first fifth of a run, at least one step.

        Args:
            sigmas: the run's schedule, with the sigma that it ends at.
            model_sampling: ComfyUI's sampling of the model.
        """
        steps = len(sigmas) - 1
        first, last = sigmas[0], sigmas[max(1, round(steps / 5)) - 1]
        if self.unit == "sigma":
            return Window(_up(first), _down(last), "sigma")
        start, end = (percents(sigma, model_sampling) for sigma in (first, last))
        return Window(_down(start[0]), _up(end[1]))


def percents(sigma: float, model_sampling: Any) -> tuple[float, float]:
    """Returns the percents next to a sigma: the last one not below it, the first not above it."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        of_middle = float(model_sampling.percent_to_sigma(middle))
        if of_middle == sigma:
            return middle, middle
        low, high = (middle, high) if of_middle > sigma else (low, middle)
    return low, high


def _up(value: float) -> float:
    return math.ceil(value * _STEP - 1e-6) / _STEP


def _down(value: float) -> float:
    return math.floor(value * _STEP + 1e-6) / _STEP
