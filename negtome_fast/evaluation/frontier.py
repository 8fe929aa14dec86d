"""Frontiers: how much diversity a method reaches at a level of quality, over a sweep of settings.

A point is a condition's (quality, diversity). Between two points the frontier is a straight line:
a set of images mixed from both conditions has their mean precision exactly, and at least their mean
entropy, which is concave. `at` asks for at least a level, so more quality never counts against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .bootstrap import Interval
from .scores import Scores, drawn, plan_of

ROUNDING = 1e-12


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
            or neither has any diversity in some draw.
        reached: share of the bootstrap's draws in which it does.
    """

    name: str
    level: float
    base: float
    method: float
    ratio: Interval | None
    reached: float


def matched(
    base: Scores,
    points: Sequence[Scores],
    quality: str = "precision",
    diversity: str = "entropy",
) -> Matched:
    """The frontier of `points`, drawn from the same seeds, at the quality of `base`."""
    plan = plan_of(base.samples)
    level, levels = drawn(base, quality, plan)
    own, own_drawn = drawn(base, diversity, plan)
    name = base.samples.condition.name
    if not points:
        return Matched(name, level, own, float("nan"), None, 0.0)
    (values, qualities), (found, diversities) = (
        zip(*(drawn(point, measure, plan) for point in points), strict=True)
        for measure in (quality, diversity)
    )
    value = float(at(np.array(values)[:, None], np.array(found)[:, None], np.array([level]))[0])
    moved = at(np.stack(qualities), np.stack(diversities), levels)
    reached = np.isfinite(moved)
    ratio = None
    # A draw in which the level is not reached counts as no gain.
    filled = np.where(reached, moved, own_drawn)
    if np.isfinite(value) and own > 0 and not ((filled == 0) & (own_drawn == 0)).any():
        ratio = plan.ratio(value, own, filled, own_drawn)
    return Matched(name, level, own, value, ratio, float(reached.mean()))
