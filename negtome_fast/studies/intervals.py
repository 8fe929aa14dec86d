"""Intervals by the paired bootstrap: both sides of a comparison draw the same items.

Images that were guided together are not independent. The bootstrap therefore draws whole blocks
(groups) of images within each stratum (prompt). Three corrections matter for few blocks:

- A stratum of B blocks draws B - 1 of them (Rao and Wu 1988). Otherwise the variance of a mean is
  too small by a factor of 1 - 1 / B.
- Quantiles are those of Student's t, not of the normal distribution (Hesterberg 2015).
- Draws repeat samples, which biases nonlinear statistics such as entropy. The interval is moved
  back by that bias: once for a difference, where the biases of both sides mostly cancel, and twice
  for the logarithm of a ratio, whose estimate is itself too large over a small entropy. The
  interval of a mean is not moved, since a mean has no bias. Where few images changed, an end is
  exactly 0, and the noise of a thousand draws could move it across 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..models.avatars import OPEN_ATTRIBUTES
from . import measures

Compare = Literal["difference", "ratio"]

#: Function from how often each block was drawn, `(draws, blocks)`, to a statistic's `(draws,)`.
Weighted = Callable[[Tensor], Tensor]

SHARE = 0.95
"""Share of intervals that contain the truth."""

_NORMAL = NormalDist()


@runtime_checkable
class BlockStatistic(Protocol):
    """A statistic that computes its value for all draws at once, without copying samples."""

    def __call__(self, samples: Any) -> float: ...

    def weighted(self, samples: Any, blocks: Tensor) -> Weighted:
        """Prepare draws of N samples, which belong to the blocks `(N,)` numbered 0, 1, ..."""
        ...


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval.

    Attributes:
        estimate: the statistic of the samples.
        low: lower end.
        high: upper end.
        samples: number of samples on each side.
        blocks: number of independent blocks among them.
        draws: number of draws.
        bias: mean of the draws minus the estimate; for a ratio, of their logarithms.
        no_change: 0 for a difference, 1 for a ratio, None for one condition.
    """

    estimate: float
    low: float
    high: float
    samples: int
    blocks: int
    draws: int
    bias: float
    no_change: float | None = None

    def contains(self, value: float) -> bool:
        """Return True if the interval, ends included, contains `value`."""
        return self.low <= value <= self.high

    @property
    def corrected(self) -> float:
        """The estimate minus its bias, as estimated by the bias of the draws.

        Report this one for a ratio of entropies; docs/measures.md says why.
        """
        if self.no_change == 1:
            return self.estimate * math.exp(-self.bias)
        return self.estimate - self.bias

    @property
    def verdict(self) -> str:
        """`"higher"`, `"lower"`, or `"no change seen"` if the interval contains `no_change`."""
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
    """Return the interval of `statistic(a) - statistic(b)`, or of their ratio.

    Args:
        statistic: function of any number of samples. The classes of this module compute all draws
            at once; any other callable is called `2 * draws` times.
        samples_a: N items: a tensor or array of N rows, or a sequence.
        samples_b: N items; item i has the seed and prompt of item i of `samples_a`.
        strata: prompt of each item; every draw keeps the strata's sizes. Default: one stratum.
        blocks: group of each item, unique over all strata or within each; the images of a group
            are drawn together. Default: every item is its own block. Use at least 8 blocks in each
            stratum: intervals of fewer are too narrow, those of 2 far too narrow
            (docs/measures.md).
        within_strata: compute the statistic in each stratum and average over strata, as for
            pairwise cosine and attribute entropy; otherwise over all items at once.
        draws: number of draws.
        seed: seed of the draws.
        compare: `"difference"` or `"ratio"`.

    Raises:
        ValueError: unequal counts, fewer than two blocks in a stratum, values that are not finite,
            or a ratio to zero.
    """
    if compare not in ("difference", "ratio"):
        raise ValueError(f"compare must be 'difference' or 'ratio', got {compare!r}")
    if len(samples_a) != len(samples_b):
        raise ValueError(
            f"paired samples must be as many on both sides, got {len(samples_a)} and "
            f"{len(samples_b)}"
        )
    plan = BootstrapPlan.of(len(samples_a), strata, blocks, draws, seed)
    (value_a, drawn_a), (value_b, drawn_b) = (
        plan.apply(statistic, samples, within_strata) for samples in (samples_a, samples_b)
    )
    if compare == "difference":
        return plan.interval(
            value_a - value_b, drawn_a - drawn_b, no_change=0.0, recentre=is_biased(statistic)
        )
    return plan.ratio(value_a, value_b, drawn_a, drawn_b)


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
    """Return the interval of `statistic` for one condition; see `paired_bootstrap`."""
    plan = BootstrapPlan.of(len(samples), strata, blocks, draws, seed)
    value, drawn = plan.apply(statistic, samples, within_strata)
    return plan.interval(value, drawn, recentre=is_biased(statistic))


def is_biased(statistic: Callable[[Any], float]) -> bool:
    """Return True if draws with repeated samples shift the statistic on average."""
    return not isinstance(statistic, Mean)


@dataclass(frozen=True)
class _Stratum:
    items: np.ndarray  # (n,) indices of its samples
    blocks: np.ndarray  # (n,) number of each sample's block, 0 ... B - 1
    counts: np.ndarray  # (draws, B) how often each block is drawn


@dataclass(frozen=True)
class BootstrapPlan:
    """The drawn blocks of each stratum, the same for all conditions.

    Use it for values of several statistics or conditions at once, such as a frontier: `apply` gives
    the draws of each, where draw i has the same items, and `interval` or `ratio` the interval.
    """

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
    ) -> BootstrapPlan:
        """Draw a plan; see `paired_bootstrap` for the arguments."""
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

    @property
    def blocks(self) -> int:
        """Number of blocks in all strata."""
        return sum(part.counts.shape[1] for part in self.strata)

    @property
    def tail(self) -> float:
        """Share of draws beyond each end: the normal's tail beyond Student's 2.5% quantile."""
        z, freedom = _NORMAL.inv_cdf((1 + SHARE) / 2), self.blocks - len(self.strata)
        # Cornish-Fisher expansion of the quantile (Abramowitz and Stegun 26.7.5).
        quantile = (
            z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        )
        return _NORMAL.cdf(-quantile)

    def interval(
        self,
        estimate: float,
        drawn: np.ndarray,
        no_change: float | None = None,
        *,
        recentre: bool = True,
    ) -> Interval:
        """Return quantiles of the draws, moved by their bias against the estimate.

        Args:
            estimate: the statistic of the samples, or a difference.
            drawn: its value in each draw, (draws,).
            no_change: 0 for a difference, None for one condition.
            recentre: move the quantiles; False for statistics without bias, see `is_biased`.
        """
        bias = float(drawn.mean()) - estimate if recentre else 0.0
        low, high = np.quantile(drawn, (self.tail, 1 - self.tail)) - bias
        return self._result(estimate, low, high, bias, no_change)

    def ratio(
        self,
        a: float,
        b: float,
        drawn_a: np.ndarray,
        drawn_b: np.ndarray,
        *,
        recentre: bool = True,
    ) -> Interval:
        """Return the interval of a ratio: quantiles of the logarithms, moved twice by their bias.

        The quantiles are not moved if some draws are zero.

        Args:
            a: the numerator.
            b: the denominator.
            drawn_a: the numerator of each draw, (draws,).
            drawn_b: the denominator of each draw, (draws,).
            recentre: move the quantiles. False if some draws stand for a failure: they lower the
                mean of the draws, and moving by it would reward the failures.

        Raises:
            ValueError: a negative value, a zero denominator, or both sides zero in a draw.
        """
        if a < 0 or b <= 0 or (drawn_a < 0).any() or (drawn_b < 0).any():
            raise ValueError(f"a ratio needs positive statistics, got {a:g} to {b:g}")
        if not recentre or (drawn_a == 0).any() or (drawn_b == 0).any():
            if ((drawn_a == 0) & (drawn_b == 0)).any():
                raise ValueError("a ratio of nothing to nothing in some draws; take the difference")
            with np.errstate(divide="ignore"):
                drawn = drawn_a / drawn_b
            low, high = np.quantile(drawn, (self.tail, 1 - self.tail), method="nearest")
            return self._result(a / b, low, high, 0.0, 1.0)
        logarithms = np.log(drawn_a / drawn_b)
        bias = float(logarithms.mean()) - math.log(a / b)
        low, high = np.quantile(logarithms, (self.tail, 1 - self.tail)) - 2 * bias
        return self._result(a / b, math.exp(low), math.exp(high), bias, 1.0)

    def _result(
        self, estimate: float, low: float, high: float, bias: float, no_change: float | None
    ) -> Interval:
        draws = len(self.strata[0].counts)
        return Interval(
            estimate, float(low), float(high), self.samples, self.blocks, draws, bias, no_change
        )

    def apply(
        self, statistic: Callable[[Any], float], samples: Any, within_strata: bool
    ) -> tuple[float, np.ndarray]:
        """Return the statistic of `samples`, and of each draw, `(draws,)`.

        Raises:
            ValueError: values that are not finite.
        """
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
        """Return all strata as one, with the same draws."""
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
    """Return sums of rows `(N, C)` within their blocks, `(B, C)`."""
    total = values.new_zeros(int(blocks.max()) + 1, values.shape[1])
    return total.index_add_(0, blocks, values)


def _means(weights: Tensor, values: Tensor, blocks: Tensor) -> Tensor:
    """Return means of rows `(N, C)` over the samples of each draw, `(draws, C)`."""
    sizes = torch.bincount(blocks).double()
    return (weights @ _summed(values, blocks)) / (weights @ sizes)[:, None]


@dataclass(frozen=True)
class Mean:
    """Mean of one number per sample, `(N,)`: shares, cosines, distances, seconds."""

    def __call__(self, samples: Any) -> float:
        return float(self._values(samples).mean())

    def weighted(self, samples: Any, blocks: Tensor) -> Weighted:
        values = self._values(samples)[:, None]
        return lambda weights: _means(weights, values, blocks)[:, 0]

    @staticmethod
    def _values(samples: Any) -> Tensor:
        values = torch.as_tensor(samples).detach().cpu().double()
        if values.dim() != 1 or not len(values):
            raise ValueError(f"a mean needs one number a sample, (N,), got {tuple(values.shape)}")
        return values


@dataclass(frozen=True)
class AttributeEntropy:
    """`measures.attribute_entropy` of the reader's readings, a sequence of N dictionaries."""

    names: tuple[str, ...] = OPEN_ATTRIBUTES

    def __call__(self, samples: Any) -> float:
        return measures.attribute_entropy(samples, self.names)

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
    """`measures.mean_pairwise_cosine` of features `(N, C)`.

    A draw repeats blocks. Pairs of copies of one block are left out, since their items were guided
    against each other and items of different blocks were not.
    """

    def __call__(self, samples: Tensor) -> float:
        return measures.mean_pairwise_cosine(samples)

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
    """`measures.inception_score` of logits `(N, classes)`."""

    def __call__(self, samples: Tensor) -> float:
        return measures.inception_score(samples)

    def weighted(self, samples: Tensor, blocks: Tensor) -> Weighted:
        shares = torch.softmax(samples.detach().cpu().double(), dim=-1)
        own = torch.special.entr(shares).sum(-1, keepdim=True)

        def value(weights: Tensor) -> Tensor:
            marginal = torch.special.entr(_means(weights, shares, blocks)).sum(-1)
            return (marginal - _means(weights, own, blocks)[:, 0]).clamp_min(0).exp()

        return value


@dataclass(frozen=True)
class FrechetTo:
    """`measures.frechet_distance` of features `(N, C)` to fixed `real` `(N, C)`.

    1000 draws of 256 samples take seconds: each needs the eigenvalues of an N x N matrix.
    """

    real: Tensor = field(repr=False)

    def __call__(self, samples: Tensor) -> float:
        return measures.frechet_distance(samples, self.real)

    def weighted(self, samples: Tensor, blocks: Tensor) -> Weighted:
        rows, real = samples.detach().cpu().double(), self.real.detach().cpu().double()
        mean = real.mean(0)
        real = (real - mean) / (len(real) - 1) ** 0.5
        rows = rows - mean
        cross, squares = rows @ real.T, rows.square().sum(-1)
        trace = real.square().sum()

        def value(weights: Tensor) -> Tensor:
            return torch.stack([one(row) for row in weights[:, blocks]])

        def one(weights: Tensor) -> Tensor:
            drawn = weights > 0
            shares = weights[drawn] / weights.sum()
            unbiased = 1 / (1 - 1 / weights.sum())
            offset = (shares @ rows[drawn]).square().sum()
            variance = (shares @ squares[drawn] - offset) * unbiased
            matrix = cross[drawn] - shares @ cross[drawn]
            matrix = matrix * (shares * unbiased).sqrt()[:, None]
            # The smaller Gram matrix has the squared singular values.
            gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
            singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()
            return offset + variance + trace - 2 * singular

        return value
