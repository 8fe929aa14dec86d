"""Frontiers: how much diversity a method reaches at a level of quality, over a sweep of settings.

A point is a condition's (quality, diversity). Between two points the frontier is a straight line:
a set of images mixed from both conditions has their mean precision exactly, and at least their mean
entropy, which is concave. `at` asks for at least a level, so more quality never counts against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .intervals import BootstrapPlan, Interval
from .scores import Scores, drawn, plan_of

ROUNDING = 1e-12
ENOUGH = 0.95
"""Share of draws that must reach a level for an interval at it."""


def at(quality: np.ndarray, diversity: np.ndarray, level: np.ndarray) -> np.ndarray:
    """The most diversity at `quality >= level`, (draws,); NaN where no point reaches the level.

    Args:
        quality, diversity: of P points, (P, draws).
        level: (draws,).
    """
    reached = quality >= level - ROUNDING
    best = np.where(reached, diversity, -np.inf).max(axis=0)
    for i in range(len(quality)):
        for j in range(len(quality)):
            # From a point at or above the level down to one below it.
            span = quality[i] - quality[j]
            crosses = reached[i] & ~reached[j]
            share = np.divide(level - quality[j], span, out=np.zeros_like(span), where=crosses)
            between = diversity[j] + share * (diversity[i] - diversity[j])
            best = np.where(crosses, np.maximum(best, between), best)
    return np.where(np.isfinite(best), best, np.nan)


def outline(points: Sequence[tuple[float, float]], levels: int = 60) -> list[tuple[float, float]]:
    """The frontier of (quality, diversity) as a line to draw, from the lowest quality up."""
    quality, diversity = np.array(points, dtype=float).T[:, :, None]
    steps = np.unique(
        np.concatenate([np.linspace(quality.min(), quality.max(), levels), quality[:, 0]])
    )
    return [(float(q), float(at(quality, diversity, np.array([q]))[0])) for q in steps]


@dataclass(frozen=True)
class Matched:
    """Diversity of a method at the quality of one condition of the base.

    Attributes:
        name: of the base's condition.
        level: its quality, which the method is held to.
        base, method: diversity of the condition, and of the method's frontier at this level (NaN
            where it does not reach it).
        ratio: method to base, paired by seed; None where the method does not reach the level,
            or neither has any diversity in some draw. Its `corrected` is the estimate to report.
    """

    name: str
    level: float
    base: float
    method: float
    ratio: Interval | None


def matched(
    base: Scores,
    points: Sequence[Scores],
    quality: str = "precision",
    diversity: str = "entropy",
) -> Matched:
    """The frontier of `points` at the quality of `base`; all drawn from the same seeds."""
    plan = plan_of(base.samples)
    level, levels = drawn(base, quality, plan)
    own, own_drawn = drawn(base, diversity, plan)
    value, moved = _Frontier.of(points, quality, diversity, plan).at(level, levels)
    reached = np.isfinite(moved)
    # A draw in which the level is not reached counts as no gain, and so may not move the interval.
    filled = np.where(reached, moved, own_drawn)
    ratio = _ratio(plan, value, own, filled, own_drawn, recentre=bool(reached.all()))
    return Matched(base.samples.condition.name, level, own, value, ratio)


@dataclass(frozen=True)
class Compared:
    """Two frontiers at one level of quality; the ratio is the first's to the second's."""

    level: float
    method: float
    rival: float
    ratio: Interval | None


def compared(
    points: Sequence[Scores],
    rivals: Sequence[Scores],
    level: float,
    quality: str = "precision",
    diversity: str = "entropy",
) -> Compared:
    """Both frontiers at this level; NaN and None where one of them does not reach it."""
    plan = plan_of(points[0].samples)
    sides = [_Frontier.of(side, quality, diversity, plan) for side in (points, rivals)]
    (value, moved), (other, other_moved) = (side.at(level, np.full(1, level)) for side in sides)
    reached = np.isfinite(moved) & np.isfinite(other_moved)
    ratio = None
    if reached.mean() >= ENOUGH:
        ratio = _ratio(plan, value, other, moved[reached], other_moved[reached], recentre=True)
    return Compared(level, value, other, ratio)


@dataclass(frozen=True)
class _Frontier:
    """Quality and diversity of P points, as estimated (P,) and in each draw (P, draws)."""

    estimates: tuple[np.ndarray, np.ndarray]
    draws: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(
        cls, points: Sequence[Scores], quality: str, diversity: str, plan: BootstrapPlan
    ) -> _Frontier:
        found = [[drawn(point, m, plan) for point in points] for m in (quality, diversity)]
        estimates = [np.array([value for value, _ in part]) for part in found]
        draws = [np.stack([moved for _, moved in part]) for part in found]
        return cls((estimates[0], estimates[1]), (draws[0], draws[1]))

    def at(self, level: float, levels: np.ndarray) -> tuple[float, np.ndarray]:
        """The most diversity at this level, and in each draw at its own."""
        quality, diversity = (part[:, None] for part in self.estimates)
        return float(at(quality, diversity, np.array([level]))[0]), at(*self.draws, levels)


def _ratio(
    plan: BootstrapPlan,
    a: float,
    b: float,
    drawn_a: np.ndarray,
    drawn_b: np.ndarray,
    *,
    recentre: bool,
) -> Interval | None:
    none_in_both = bool(((drawn_a == 0) & (drawn_b == 0)).any())
    if not np.isfinite(a) or not b > 0 or none_in_both:
        return None
    return plan.ratio(a, b, drawn_a, drawn_b, recentre=recentre)
