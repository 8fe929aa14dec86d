"""Frontiers: the most diversity that a method reaches at a level of quality, over its settings.

A point is a condition's (quality, diversity). Between two points the frontier is a straight line: a
mixture of both conditions' images has exactly their mean precision and at least their mean entropy,
since entropy is concave. `at` takes every point at or above the level, so more quality never hurts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .intervals import BootstrapPlan, Interval
from .scores import Scores, drawn, plan_of

_ROUNDING = 1e-12

_ENOUGH = 0.95
"""Share of draws that must reach a level, or its interval is not given."""


def at(quality: np.ndarray, diversity: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Return the most diversity at `quality >= level`, (draws,); NaN if no point reaches it.

    Args:
        quality: quality of P points in each draw, (P, draws).
        diversity: diversity of the same points, (P, draws).
        level: quality to reach in each draw, (draws,).
    """
    reached = quality >= level - _ROUNDING
    best = np.where(reached, diversity, -np.inf).max(axis=0)
    for i in range(len(quality)):
        for j in range(len(quality)):
            # The line from a point at or above the level down to a point below it.
            span = quality[i] - quality[j]
            crosses = reached[i] & ~reached[j]
            share = np.divide(level - quality[j], span, out=np.zeros_like(span), where=crosses)
            between = diversity[j] + share * (diversity[i] - diversity[j])
            best = np.where(crosses, np.maximum(best, between), best)
    return np.where(np.isfinite(best), best, np.nan)


def outline(points: Sequence[tuple[float, float]], levels: int = 60) -> list[tuple[float, float]]:
    """Return the frontier of (quality, diversity) points as a line, from the lowest quality up."""
    quality, diversity = np.array(points, dtype=float).T[:, :, None]
    steps = np.unique(
        np.concatenate([np.linspace(quality.min(), quality.max(), levels), quality[:, 0]])
    )
    return [(float(q), float(at(quality, diversity, np.array([q]))[0])) for q in steps]


@dataclass(frozen=True)
class Matched:
    """Diversity of a method at the quality of a base condition.

    Attributes:
        name: name of the base condition.
        level: quality of the base condition, which the method must reach.
        base: diversity of the base condition.
        method: diversity of the method's frontier at this level; NaN if it does not reach it.
        ratio: method to base, paired by seed; its `corrected` is the estimate to report. None if
            the method does not reach the level, or if both diversities are 0 in some draw.
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
    """Return the frontier of `points` at the quality of `base`; all have the same seeds.

    Args:
        base: the base condition.
        points: conditions of the method.
        quality: measure of quality, a name in `scores.MEASURES`.
        diversity: measure of diversity, likewise.
    """
    plan = plan_of(base.samples)
    level, levels = drawn(base, quality, plan)
    own, own_drawn = drawn(base, diversity, plan)
    value, moved = _Frontier.of(points, quality, diversity, plan).at(level, levels)
    reached = np.isfinite(moved)
    # A draw that does not reach the level counts as no gain; the interval is then not recentred.
    filled = np.where(reached, moved, own_drawn)
    ratio = _ratio(plan, value, own, filled, own_drawn, recentre=bool(reached.all()))
    return Matched(base.samples.condition.name, level, own, value, ratio)


@dataclass(frozen=True)
class Compared:
    """Two frontiers at one level of quality.

    Attributes:
        level: the quality.
        method: diversity of the first frontier; NaN if it does not reach the level.
        rival: diversity of the second frontier; NaN if it does not reach the level.
        ratio: first to second; None if one does not reach the level in enough draws.
    """

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
    """Return both frontiers at this level of quality; see `matched` for the arguments."""
    plan = plan_of(points[0].samples)
    sides = [_Frontier.of(side, quality, diversity, plan) for side in (points, rivals)]
    (value, moved), (other, other_moved) = (side.at(level, np.full(1, level)) for side in sides)
    reached = np.isfinite(moved) & np.isfinite(other_moved)
    ratio = None
    if reached.mean() >= _ENOUGH:
        ratio = _ratio(plan, value, other, moved[reached], other_moved[reached], recentre=True)
    return Compared(level, value, other, ratio)


@dataclass(frozen=True)
class _Frontier:
    """Quality and diversity of P points: estimates (P,) and draws (P, draws)."""

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
        """Return the most diversity at `level`, and in each draw at its level in `levels`."""
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
