"""Intervals by the paired bootstrap: both sides of a comparison are drawn with the same seeds.

What is drawn is a block: images that were guided together are not independent, so they are drawn
whole, within each stratum (prompt). A stratum of B blocks gives B - 1 a draw (Rao and Wu 1988, the
rescaling bootstrap): B would make the variance of a mean too small by (B - 1) / B, an eighth at 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..models.avatars import OPEN_ATTRIBUTES
from . import metrics

Compare = Literal["difference", "ratio"]

#: Values of a drawn statistic `(draws,)` from how often each block was drawn, `(draws, blocks)`.
Weighted = Callable[[Tensor], Tensor]

SHARE = 0.95


@runtime_checkable
class BlockStatistic(Protocol):
    """A statistic that knows its value for all draws at once, without taking samples out."""

    def __call__(self, samples: Any) -> float: ...

    def weighted(self, samples: Any, blocks: Tensor) -> Weighted:
        """Prepares draws of `samples`, whose N items belong to the blocks `(N,)` 0, 1, ..."""
        ...


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval; `no_change` is 0 for a difference and 1 for a ratio.

    `no_change` is None for the interval of one condition, which is compared with nothing.
    """

    estimate: float
    low: float
    high: float
    samples: int
    draws: int
    no_change: float | None = None

    def contains(self, value: float) -> bool:
        """Whether the interval, ends included, contains `value`."""
        return self.low <= value <= self.high

    @property
    def verdict(self) -> str:
        """`"higher"`, `"lower"`, or `"no change seen"` where the interval contains no change."""
        if self.no_change is None:
            raise ValueError("the interval of one condition compares nothing")
        if self.contains(self.no_change):
            return "no change seen"
        return "higher" if self.low > self.no_change else "lower"


def paired_bootstrap(
    statistic: Callable[[Any], float],
    samples_a: Any,
    samples_b: Any,
    *,
    strata: Sequence[Hashable] | None = None,
    blocks: Sequence[Hashable] | None = None,
    within_strata: bool = False,
    draws: int = 1000,
    seed: int = 0,
    compare: Compare = "difference",
) -> Interval:
    """Interval of `statistic(a) - statistic(b)`, or of their ratio, with the same items drawn.

    Args:
        statistic: of any number of samples. The classes of this module are computed for all draws
            at once; any other callable is called `2 * draws` times.
        samples_a: N items: a tensor or array of N rows, or a sequence.
        samples_b: N items; item i has the seed and prompt of item i of `samples_a`.
        strata: the prompt of each item; draws keep their sizes. Default: one stratum.
        blocks: the group of each item, unique over all strata or within each; its images are drawn
            together. Default: every item is its own block.
        within_strata: the statistic is computed in each stratum and averaged over them, as mean
            pairwise cosine and attribute entropy over prompts are; otherwise over all items.
        draws: number of draws.
        seed: of the draws.
        compare: `"difference"` or `"ratio"`.

    Raises:
        ValueError: unequal counts, fewer than two blocks in a stratum, values that are not finite,
            a ratio to nothing.
    """
    if compare not in ("difference", "ratio"):
        raise ValueError(f"compare must be 'difference' or 'ratio', got {compare!r}")
    if len(samples_a) != len(samples_b):
        raise ValueError(
            f"paired samples must be as many on both sides, got {len(samples_a)} and "
            f"{len(samples_b)}"
        )
    plan = _Plan.of(len(samples_a), strata, blocks, draws, seed)
    (value_a, drawn_a), (value_b, drawn_b) = (
        plan.apply(statistic, samples, within_strata) for samples in (samples_a, samples_b)
    )
    if compare == "difference":
        low, high = _bounds(drawn_a - drawn_b)
        return Interval(value_a - value_b, low, high, plan.samples, draws, 0.0)
    if value_b <= 0 or value_a < 0:
        raise ValueError(f"a ratio needs positive statistics, got {value_a:g} to {value_b:g}")
    low, high = _bounds(np.divide(drawn_a, drawn_b))
    return Interval(value_a / value_b, low, high, plan.samples, draws, 1.0)


def bootstrap(
    statistic: Callable[[Any], float],
    samples: Any,
    *,
    strata: Sequence[Hashable] | None = None,
    blocks: Sequence[Hashable] | None = None,
    within_strata: bool = False,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Interval of `statistic` of one condition, for error bars; see `paired_bootstrap`."""
    plan = _Plan.of(len(samples), strata, blocks, draws, seed)
    value, drawn = plan.apply(statistic, samples, within_strata)
    low, high = _bounds(drawn)
    return Interval(value, low, high, plan.samples, draws)


def _bounds(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, ((1 - SHARE) / 2, (1 + SHARE) / 2))
    return float(low), float(high)


@dataclass(frozen=True)
class _Stratum:
    items: np.ndarray  # (n,) indices of its samples
    blocks: np.ndarray  # (n,) number of each sample's block, 0 ... B - 1
    counts: np.ndarray  # (draws, B) how often each block is drawn


@dataclass(frozen=True)
class _Plan:
    """What is drawn, the same for both sides."""

    samples: int
    strata: list[_Stratum] = field(repr=False)

    @classmethod
    def of(
        cls,
        samples: int,
        strata: Sequence[Hashable] | None,
        blocks: Sequence[Hashable] | None,
        draws: int,
        seed: int,
    ) -> _Plan:
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        for name, labels in (("strata", strata), ("blocks", blocks)):
            if labels is not None and len(labels) != samples:
                raise ValueError(f"{name} must name {samples} samples, got {len(labels)}")
        rng = np.random.default_rng(seed)
        of_item = _numbered(strata) if strata is not None else np.zeros(samples, np.int64)
        of_block = _numbered(blocks) if blocks is not None else np.arange(samples)
        parts = []
        for stratum in range(int(of_item.max(initial=-1)) + 1):
            items = np.flatnonzero(of_item == stratum)
            own = np.unique(of_block[items], return_inverse=True)[1]
            count = int(own.max()) + 1
            if count < 2:
                raise ValueError(
                    f"every stratum needs at least 2 independent blocks to draw from, stratum "
                    f"{stratum} has 1 of {len(items)} samples"
                )
            counts = rng.multinomial(count - 1, np.full(count, 1 / count), size=draws)
            parts.append(_Stratum(items, own, counts))
        if not parts:
            raise ValueError("the bootstrap needs samples, got none")
        return cls(samples, parts)

    def apply(
        self, statistic: Callable[[Any], float], samples: Any, within_strata: bool
    ) -> tuple[float, np.ndarray]:
        """The statistic of `samples`, and of each draw of them `(draws,)`."""
        parts = self.strata if within_strata else [self._pooled()]
        values, drawn = [], []
        for part in parts:
            taken = _take(samples, part.items)
            values.append(float(statistic(taken)))
            drawn.append(_draw(statistic, taken, part))
        value, all_drawn = float(np.mean(values)), np.mean(drawn, axis=0)
        if not math.isfinite(value) or not np.isfinite(all_drawn).all():
            raise ValueError(f"{statistic} gave values that are not finite")
        return value, all_drawn

    def _pooled(self) -> _Stratum:
        """All strata as one, drawn as before."""
        offsets = np.cumsum([0, *(part.counts.shape[1] for part in self.strata)])
        return _Stratum(
            np.concatenate([part.items for part in self.strata]),
            np.concatenate(
                [part.blocks + start for part, start in zip(self.strata, offsets, strict=False)]
            ),
            np.concatenate([part.counts for part in self.strata], axis=1),
        )


def _numbered(labels: Sequence[Hashable]) -> np.ndarray:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], np.int64)


def _take(samples: Any, items: np.ndarray) -> Any:
    if isinstance(samples, Tensor):
        return samples[torch.from_numpy(items).to(samples.device)]
    if isinstance(samples, np.ndarray):
        return samples[items]
    return [samples[item] for item in items]


def _draw(statistic: Callable[[Any], float], samples: Any, part: _Stratum) -> np.ndarray:
    if isinstance(statistic, BlockStatistic):
        weighted = statistic.weighted(samples, torch.from_numpy(part.blocks))
        return weighted(torch.from_numpy(part.counts).double()).numpy()
    members = [np.flatnonzero(part.blocks == block) for block in range(part.counts.shape[1])]
    values = []
    for counts in part.counts:
        items = [np.tile(members[block], count) for block, count in enumerate(counts)]
        values.append(statistic(_take(samples, np.concatenate(items))))
    return np.array(values)


# Statistics that are computed for all draws at once


def _summed(values: Tensor, blocks: Tensor) -> Tensor:
    """Rows `(N, C)` summed within their blocks, `(B, C)`."""
    total = values.new_zeros(int(blocks.max()) + 1, values.shape[1])
    return total.index_add_(0, blocks, values)


def _means(weights: Tensor, values: Tensor, blocks: Tensor) -> Tensor:
    """Means of rows `(N, C)` over the samples of each draw, `(draws, C)`."""
    sizes = torch.bincount(blocks).double()
    return (weights @ _summed(values, blocks)) / (weights @ sizes)[:, None]


@dataclass(frozen=True)
class Mean:
    """Mean of one number a sample: shares, cosines, distances, seconds; `(N,)`."""

    def __call__(self, samples: Any) -> float:
        return float(self._values(samples).mean())

    def weighted(self, samples: Any, blocks: Tensor) -> Weighted:
        values = self._values(samples)[:, None]
        return lambda weights: _means(weights, values, blocks)[:, 0]

    @staticmethod
    def _values(samples: Any) -> Tensor:
        values = torch.as_tensor(samples).detach().cpu().double()
        if values.dim() != 1 or not len(values):
            raise ValueError(f"a mean is taken of one number a sample, got {tuple(values.shape)}")
        return values


@dataclass(frozen=True)
class AttributeEntropy:
    """`metrics.attribute_entropy` of the reader's readings, a sequence of N dictionaries."""

    names: tuple[str, ...] = OPEN_ATTRIBUTES

    def __call__(self, samples: Any) -> float:
        return metrics.attribute_entropy(samples, self.names)

    def weighted(self, samples: Any, blocks: Tensor) -> Weighted:
        one_hots = []
        for name in self.names:
            numbers = torch.from_numpy(_numbered([reading[name] for reading in samples]))
            one_hots.append(torch.nn.functional.one_hot(numbers).double())
        return lambda weights: (
            sum(
                torch.special.entr(_means(weights, one_hot, blocks)).sum(-1) for one_hot in one_hots
            )
            / len(one_hots)
        )


@dataclass(frozen=True)
class PairwiseCosine:
    """`metrics.mean_pairwise_cosine` of features `(N, C)`.

    A draw repeats blocks. An item is no pair with its own copy, nor with its block's other copies:
    those pairs would be guided against each other, which items of different blocks are not.
    """

    def __call__(self, samples: Tensor) -> float:
        return metrics.mean_pairwise_cosine(samples)

    def weighted(self, samples: Tensor, blocks: Tensor) -> Weighted:
        unit = torch.nn.functional.normalize(samples.detach().cpu().double(), dim=-1)
        sums, sizes = _summed(unit, blocks), torch.bincount(blocks).double()
        between = sums @ sums.T
        same = between.diagonal()  # includes each row with itself, whose cosine is 1
        squares = sizes.square()

        def value(weights: Tensor) -> Tensor:
            twice = weights.square()
            cosines = ((weights @ between) * weights).sum(1) - twice @ same
            pairs = (weights @ sizes).square() - twice @ squares
            return (cosines + weights @ (same - sizes)) / (pairs + weights @ (squares - sizes))

        return value


@dataclass(frozen=True)
class InceptionScore:
    """`metrics.inception_score` of logits `(N, classes)`."""

    def __call__(self, samples: Tensor) -> float:
        return metrics.inception_score(samples)

    def weighted(self, samples: Tensor, blocks: Tensor) -> Weighted:
        shares = torch.softmax(samples.detach().cpu().double(), dim=-1)
        own = torch.special.entr(shares).sum(-1, keepdim=True)

        def value(weights: Tensor) -> Tensor:
            marginal = torch.special.entr(_means(weights, shares, blocks)).sum(-1)
            return (marginal - _means(weights, own, blocks)[:, 0]).clamp_min(0).exp()

        return value
