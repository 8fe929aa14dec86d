"""Scores of a condition: its measures with intervals, and the scores of each sample.

The bootstrap draws the images of a group together and prompts apart. Precision, recall and Frechet
distance compare with balanced real images, which lack the bias of the training set. Recall and
Frechet distance take as many real images as samples. Precision takes all of them: with few, it
would depend on which real images happen to lie beside the few modes of a model that repeats itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..models.avatars import OPEN_ATTRIBUTES
from ..models.reader import HEADS
from . import measures
from .intervals import (
    AttributeEntropy,
    BootstrapPlan,
    FrechetTo,
    InceptionScore,
    Interval,
    Mean,
    PairwiseCosine,
    is_biased,
)
from .samples import Samples


@dataclass(frozen=True)
class Real:
    """Features of balanced real images to compare with, fp32 (N, 1280).

    Attributes:
        features: features of the rendered images.
        decoded: features after the model's VAE, the best that the model could draw.
    """

    features: Tensor = field(repr=False)
    decoded: Tensor = field(repr=False)


@dataclass(frozen=True)
class Scores:
    """The samples of a condition beside real images; made by `scores_of`.

    Attributes:
        samples: the samples.
        real: balanced real images.
        logits: class logits of the features, (N, classes), for the inception-style score.
        inside: True for samples in the manifold of the real images, bool (N,).
        inside_decoded: the same for the real images after the model's VAE.
    """

    samples: Samples
    real: Real
    logits: Tensor = field(repr=False)
    inside: Tensor = field(repr=False)
    inside_decoded: Tensor = field(repr=False)

    @cached_property
    def features(self) -> Tensor:
        """Features of the samples, fp32 (N, 1280)."""
        return torch.from_numpy(self.samples.features)

    @cached_property
    def hits(self) -> Tensor:
        """True for samples that show everything that their prompt names, bool (N,)."""
        return measures.prompt_hits(self.samples.readings, self.samples.prompts)

    @cached_property
    def as_many_real(self) -> Tensor:
        """Features of as many real images as samples, for Frechet distance and recall."""
        if len(self.samples) > len(self.real.features):
            raise ValueError(
                f"{len(self.samples)} samples of a condition need as many real images, there are "
                f"{len(self.real.features)}"
            )
        return self.real.features[: len(self.samples)]

    @cached_property
    def _drawn(self) -> dict[str, tuple[float, np.ndarray]]:
        """Cache of `drawn`, by measure."""
        return {}

    def drawn(self, measure: str) -> tuple[float, np.ndarray]:
        """Return a measure in `MEASURES` of the samples, and of each draw, (draws,)."""
        if measure not in self._drawn:
            self._drawn[measure] = drawn(self, measure, _plan(self, measure))
        return self._drawn[measure]

    @cached_property
    def likeness(self) -> np.ndarray:
        """Mean cosine of each sample with the others of its prompt, (N,)."""
        likeness = np.empty(len(self.samples))
        for prompt in dict.fromkeys(self.samples.prompts):
            at = [i for i, other in enumerate(self.samples.prompts) if other == prompt]
            unit = torch.nn.functional.normalize(self.features[at].double(), dim=-1)
            cosines = unit @ unit.T
            likeness[at] = ((cosines.sum(1) - 1) / max(1, len(at) - 1)).numpy()
        return likeness


def scores_of(
    samples: Mapping[str, Samples], real: Real, logits: Callable[[Tensor], Tensor]
) -> dict[str, Scores]:
    """Return the scores of several conditions.

    All are scored at once, because the manifold of many real images takes a while.

    Args:
        samples: the samples of each condition, by name.
        real: balanced real images.
        logits: class logits of features, (N, 1280) -> (N, classes).
    """
    features = [torch.from_numpy(one.features) for one in samples.values()]
    together, counts = torch.cat(features), [len(one) for one in features]
    inside, decoded = (
        measures.inside_manifold(manifold, together).split(counts)
        for manifold in (real.features, real.decoded)
    )
    return {
        name: Scores(one, real, logits(own), a, b)
        for (name, one), own, a, b in zip(samples.items(), features, inside, decoded, strict=True)
    }


DRAWS = 1000
"""Default number of draws of the bootstrap."""


@dataclass(frozen=True)
class Measure:
    """A measure of a condition.

    Attributes:
        label: name in tables and on axes.
        values: function from the scores to N items.
        statistic: function from the scores to the statistic of those items; it may depend on the
            real images.
        within: compute it in each prompt and average over prompts; otherwise over all samples.
        digits: number of digits after the point.
        better: the direction that is an improvement.
        draws: number of draws of the bootstrap.
    """

    label: str
    values: Callable[[Scores], Any]
    statistic: Callable[[Scores], Callable[[Any], float]]
    within: bool
    digits: int
    better: Literal["higher", "lower"]
    draws: int = DRAWS


def _mean(scores: Scores) -> Mean:
    return Mean()


#: Measures with intervals.
MEASURES: dict[str, Measure] = {
    "entropy": Measure(
        "attribute entropy, nats",
        lambda s: s.samples.readings,
        lambda s: AttributeEntropy(OPEN_ATTRIBUTES),
        True,
        2,
        "higher",
    ),
    "cosine": Measure(
        "pairwise cosine", lambda s: s.features, lambda s: PairwiseCosine(), True, 3, "lower"
    ),
    "precision": Measure("precision", lambda s: s.inside.double(), _mean, False, 3, "higher"),
    "precision_decoded": Measure(
        "precision, real after the VAE",
        lambda s: s.inside_decoded.double(),
        _mean,
        False,
        3,
        "higher",
    ),
    "agreement": Measure("prompt kept", lambda s: s.hits.double(), _mean, False, 3, "higher"),
    "inception": Measure(
        "inception-style score", lambda s: s.logits, lambda s: InceptionScore(), False, 2, "higher"
    ),
    # Each draw needs the eigenvalues of an N x N matrix, hence fewer draws.
    "frechet": Measure(
        "Frechet distance",
        lambda s: s.features,
        lambda s: FrechetTo(s.as_many_real),
        False,
        0,
        "lower",
        draws=500,
    ),
}  # fmt: skip

#: Measures without intervals, (label, digits): the repeated samples of a bootstrap bias them.
POINT_MEASURES: dict[str, tuple[str, int]] = {
    "recall": ("recall", 3),
    "vendi": ("Vendi score", 2),
}


def plan_of(samples: Samples, draws: int = DRAWS) -> BootstrapPlan:
    """Return the plan of the samples; conditions of the same prompts and seeds share its draws."""
    blocks = samples.groups.tolist()
    return BootstrapPlan.of(len(samples), samples.prompts, blocks, draws, seed=0)


def drawn(scores: Scores, measure: str, plan: BootstrapPlan) -> tuple[float, np.ndarray]:
    """Return a measure of the samples, and of each draw of the plan, (draws,)."""
    how = MEASURES[measure]
    return plan.apply(how.statistic(scores), how.values(scores), how.within)


def _plan(scores: Scores, measure: str) -> BootstrapPlan:
    return plan_of(scores.samples, MEASURES[measure].draws)


def interval(scores: Scores, measure: str) -> Interval:
    """Return a measure with its 95% interval."""
    recentre = is_biased(MEASURES[measure].statistic(scores))
    return _plan(scores, measure).interval(*scores.drawn(measure), recentre=recentre)


def change(scores: Scores, base: Scores, measure: str, *, ratio: bool = False) -> Interval:
    """Return the difference or ratio to another condition, paired by seed.

    Raises:
        ValueError: the conditions have different seeds, prompts or groups.
    """
    _check_paired(scores.samples, base.samples)
    plan = _plan(scores, measure)
    (a, drawn_a), (b, drawn_b) = (side.drawn(measure) for side in (scores, base))
    if ratio:
        return plan.ratio(a, b, drawn_a, drawn_b)
    recentre = is_biased(MEASURES[measure].statistic(scores))
    return plan.interval(a - b, drawn_a - drawn_b, no_change=0.0, recentre=recentre)


def point_measures(scores: Scores) -> dict[str, float]:
    """Return `POINT_MEASURES`; recall takes as many real images as samples."""
    prompts = list(dict.fromkeys(scores.samples.prompts))
    vendi = []
    for prompt in prompts:
        at = [i for i, other in enumerate(scores.samples.prompts) if other == prompt]
        vendi.append(measures.vendi_score(scores.features[at]))
    return {
        "recall": float(
            measures.inside_manifold(scores.features, scores.as_many_real).double().mean()
        ),
        "vendi": sum(vendi) / len(vendi),
    }


def record(scores: Scores, base: Scores | None = None) -> dict[str, Any]:
    """Return a condition's record for the result file.

    It has the settings, the measures, their changes to `base`, and the scores of each sample.
    """
    samples = scores.samples
    measures: dict[str, Any] = {name: triple(interval(scores, name)) for name in MEASURES}
    measures |= {name: round(value, 4) for name, value in point_measures(scores).items()}
    result: dict[str, Any] = {
        "name": samples.condition.name,
        "settings": samples.condition.to_dict(),
        "images": len(samples),
        "pushed": _rounded(samples.pushed),
        "similarity": _rounded(samples.similarity),
        "measures": measures,
    }
    if base is not None and base is not scores:
        changes = {name: change(scores, base, name) for name in MEASURES}
        result["base"] = base.samples.condition.name
        result["changes"] = {
            name: [*triple(found), found.verdict] for name, found in changes.items()
        }
    result["samples"] = {
        # One digit per image: the index of the value in HEADS, or 0 or 1.
        **{head: _digits(samples.indices[:, i]) for i, head in enumerate(HEADS)},
        "inside": _digits(scores.inside.int().numpy()),
        "inside_decoded": _digits(scores.inside_decoded.int().numpy()),
        "agreement": _digits(scores.hits.int().numpy()),
        "likeness": [round(value, 3) for value in scores.likeness.tolist()],
    }
    return result


def triple(found: Interval) -> list[Any]:
    """Return [estimate, low, high] for JSON; None for an unbounded end."""
    return [
        round(value, 4) if math.isfinite(value) else None
        for value in (found.estimate, found.low, found.high)
    ]


def corrected(found: Interval | None) -> list[Any] | None:
    """Return [estimate without its bias, low, high] of a ratio of entropies.

    docs/measures.md says why.
    """
    if found is None:
        return None
    _, low, high = triple(found)
    # An unbounded end means that some draws were zero, and then the bias is unknown.
    estimate = found.corrected if high is not None else found.estimate
    return [round(estimate, 4), low, high]


def _rounded(value: float) -> float | None:
    return None if value != value else round(value, 4)


def _digits(values: Sequence[int] | np.ndarray) -> str:
    return "".join(str(int(value)) for value in values)


def _check_paired(a: Samples, b: Samples) -> None:
    if a.seeds != b.seeds or a.prompts != b.prompts or a.groups.tolist() != b.groups.tolist():
        raise ValueError(
            f"{a.condition.name} and {b.condition.name} were drawn from different seeds, prompts "
            "or groups, so they cannot be compared image by image"
        )
