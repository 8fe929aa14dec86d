"""Measures of features `(N, C)`, logits, pixels and readings of the attribute reader, in float64.

Diversity: pairwise cosine, Vendi score, attribute entropy, recall. Quality: Frechet distance,
precision, inception-style score, prompt agreement, contrast. Likeness: cosine, L2, recognised.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.avatars import OPEN_ATTRIBUTES, attributes_in

__all__ = [
    "attribute_entropy",
    "contrast",
    "entropy",
    "feature_cosine",
    "frechet_distance",
    "inception_score",
    "inside_manifold",
    "latent_l2",
    "mean_pairwise_cosine",
    "precision_recall",
    "prompt_agreement",
    "prompt_hits",
    "recognised",
    "vendi_score",
]

#: An image as the attribute reader sees it: `{head: value}`.
Reading = dict[str, str]


def _rows(values: Tensor, name: str, least: int) -> Tensor:
    """Return `values` in float64; raise `ValueError` for a wrong shape, count or value."""
    if values.dim() != 2 or len(values) < least:
        raise ValueError(
            f"{name} needs (N, C) with at least {least} rows, got {tuple(values.shape)}"
        )
    values = values.detach().double()
    if not values.isfinite().all():
        raise ValueError(f"{name} got values that are not finite")
    return values


def _unit_rows(values: Tensor, name: str, least: int) -> Tensor:
    values = _rows(values, name, least)
    norms = values.norm(dim=-1, keepdim=True)
    if not bool((norms > 0).all()):
        raise ValueError(f"{name} got a row of zeros, which has no direction")
    return values / norms


def _same_width(a: Tensor, b: Tensor, name: str) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{name} compares features of {a.shape[1]} and {b.shape[1]} channels")


# Diversity


def mean_pairwise_cosine(features: Tensor) -> float:
    """Return the mean cosine of all pairs of rows of `(N, C)`; lower is more diverse.

    Raises:
        ValueError: fewer than two rows, a row of zeros, or values that are not finite.
    """
    unit = _unit_rows(features, "pairwise cosine", 2)
    count = len(unit)
    return float((unit @ unit.T).triu(1).sum() / (count * (count - 1) / 2))


def vendi_score(features: Tensor) -> float:
    """Return the effective number of different rows of `(N, C)`.

    It is 1 if all rows are equal and N if all are orthogonal: `exp(-sum_i l_i log l_i)` over the
    eigenvalues `l` of the cosine kernel divided by N (Friedman and Dieng, arXiv 2210.02410).

    Raises:
        ValueError: no rows, a row of zeros, or values that are not finite.
    """
    unit = _unit_rows(features, "Vendi score", 1)
    # The smaller Gram matrix has the same nonzero eigenvalues.
    gram = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    eigenvalues = torch.linalg.eigvalsh(gram / len(unit)).clamp_min(0)
    return math.exp(float(torch.special.entr(eigenvalues).sum()))


def entropy(values: Sequence[str]) -> float:
    """Return the entropy of the empirical distribution of `values`, in nats; 0 if all are equal.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("entropy needs at least one value")
    counts = Counter(values)
    return sum(n / len(values) * math.log(len(values) / n) for n in counts.values())


def attribute_entropy(readings: Sequence[Reading], names: Sequence[str] = OPEN_ATTRIBUTES) -> float:
    """Return the mean over attributes `names` of the entropy of their readings, in nats.

    Raises:
        ValueError: no readings or no names.
    """
    if not names:
        raise ValueError("attribute entropy needs at least one attribute")
    return sum(entropy([reading[name] for reading in readings]) for name in names) / len(names)


# Quality


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance of Gaussians fitted to `a` and `b`, both `(N, C)`.

    `|m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)` with unbiased covariances. The last
    trace is the sum of the singular values of `X_a X_b^T / (N - 1)`, with `X` the centred rows. No
    square root of a matrix is taken, so the value is exact with fewer samples than channels too.

    The estimate is too large by an amount that falls with N. Both sides therefore need the same
    number of samples, and only values at equal N compare. Do not call it FID: that is this distance
    on Inception-v3 features.

    Raises:
        ValueError: unequal counts or widths, fewer than two rows, or values that are not finite.
    """
    a, b = _rows(a, "Frechet distance", 2), _rows(b, "Frechet distance", 2)
    _same_width(a, b, "Frechet distance")
    if len(a) != len(b):
        raise ValueError(
            f"Frechet distance needs the same number of samples on both sides, "
            f"got {len(a)} and {len(b)}; its bias depends on the number"
        )
    mean_a, mean_b = a.mean(0), b.mean(0)
    scale = (len(a) - 1) ** -0.5
    a, b = (a - mean_a) * scale, (b - mean_b) * scale
    traces = a.square().sum() + b.square().sum()
    if len(a) > a.shape[1]:  # R of `X = Q R` has the covariance of X in fewer rows
        a, b = torch.linalg.qr(a, mode="r").R, torch.linalg.qr(b, mode="r").R
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float(((mean_a - mean_b).square().sum() + traces - 2 * cross).clamp_min(0))


def inside_manifold(real: Tensor, generated: Tensor, k: int = 5) -> Tensor:
    """Return which rows of `generated` lie in the manifold of `real`, bool `(N,)`.

    The manifold is the union of balls around the rows of `real`. The radius of a ball is the
    distance to the k-th nearest other row (Kynkaanniemi et al., arXiv 1904.06991, equation 1).

    Raises:
        ValueError: k or fewer rows in `real`, unequal widths, or values that are not finite.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    real = _rows(real, f"the manifold of {k} neighbours", k + 1)
    generated = _rows(generated, "the manifold", 1)
    _same_width(real, generated, "the manifold")
    own = _distances(real, real).fill_diagonal_(math.inf)
    radii = own.kthvalue(k, dim=1).values
    return (_distances(generated, real) <= radii).any(dim=1)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Return Euclidean distances `(N, M)`; distances below the rounding error are 0."""
    centre = b.mean(0)
    a, b = a - centre, b - centre
    norms = a.square().sum(-1)[:, None] + b.square().sum(-1)
    squared = norms - 2 * (a @ b.T)
    return squared.masked_fill(squared < 1e-12 * norms, 0).sqrt()


def precision_recall(real: Tensor, generated: Tensor, k: int = 5) -> tuple[float, float]:
    """Return the share of `generated` in the manifold of `real`, and the other way round.

    Both depend on the number of rows that span the manifold, so only values at equal numbers
    compare. See `inside_manifold`.
    """
    precision = inside_manifold(real, generated, k).double().mean()
    recall = inside_manifold(generated, real, k).double().mean()
    return float(precision), float(recall)


def inception_score(logits: Tensor) -> float:
    """Return the inception-style score of logits `(N, classes)`, from 1 to the number of classes.

    `exp(mean_x KL(p(y|x) || p(y)))` (Salimans et al., arXiv 1606.03498) over all N at once. The
    classes are those of the given network, so published Inception-v3 scores are not comparable.

    Raises:
        ValueError: fewer than two rows, or values that are not finite.
    """
    log_p = torch.log_softmax(_rows(logits, "inception-style score", 2), dim=-1)
    own = torch.special.entr(log_p.exp()).sum(-1).mean()
    marginal = torch.special.entr(log_p.exp().mean(0)).sum()
    return math.exp(max(0.0, float(marginal - own)))


def prompt_hits(readings: Sequence[Reading], prompts: str | Sequence[str]) -> Tensor:
    """Return which images show every attribute that their prompt names, style included.

    Args:
        readings: readings of N images.
        prompts: one prompt for all images, or N prompts.

    Returns:
        bool `(N,)`.

    Raises:
        ValueError: another number of prompts.
    """
    if isinstance(prompts, str):
        prompts = [prompts] * len(readings)
    if len(prompts) != len(readings):
        raise ValueError(f"{len(readings)} readings need as many prompts, got {len(prompts)}")
    wanted = {prompt: attributes_in(prompt) for prompt in set(prompts)}
    return torch.tensor(
        [
            all(reading[name] == value for name, value in wanted[prompt].items())
            for reading, prompt in zip(readings, prompts, strict=True)
        ],
        dtype=torch.bool,
    )


def prompt_agreement(readings: Sequence[Reading], prompt: str | Sequence[str]) -> float:
    """Return the share of images that show every attribute that `prompt` names, style included.

    Raises:
        ValueError: no readings, or neither one prompt nor one for each.
    """
    if not readings:
        raise ValueError("prompt agreement needs at least one reading")
    return float(prompt_hits(readings, prompt).double().mean())


def contrast(images: Tensor) -> Tensor:
    """Return the mean difference of neighbouring pixels of images `(N, 3, H, W)` in [0, 1].

    The result `(N,)` counts 8-bit steps, 1/255 of the full scale.
    """
    grey = images.mean(dim=1).double() * 255
    steps = [grey.diff(dim=axis).abs().flatten(1).mean(1) for axis in (1, 2)]
    return (steps[0] + steps[1]) / 2


# Likeness to a reference


def feature_cosine(features: Tensor, target: Tensor) -> Tensor:
    """Return the cosine of each row of `(N, C)` with the closest `target`, `(N,)`.

    Args:
        features: `(N, C)`.
        target: `(C,)` or `(M, C)`.

    Raises:
        ValueError: unequal widths, a row of zeros, or values that are not finite.
    """
    rows = _unit_rows(features, "feature cosine", 1)
    targets = _unit_rows(target[None] if target.dim() == 1 else target, "feature cosine", 1)
    _same_width(rows, targets, "feature cosine")
    return (rows @ targets.T).amax(dim=1)


def latent_l2(latents: Tensor, target: Tensor) -> Tensor:
    """Return the Euclidean distance of each of `latents` `(N, ...)` to `target` `(...)`, `(N,)`.

    Raises:
        ValueError: shapes that do not match, or values that are not finite.
    """
    if latents.dim() < 2 or latents.shape[1:] != target.shape:
        raise ValueError(
            f"latents (N, ...) and a target (...) are needed, "
            f"got {tuple(latents.shape)} and {tuple(target.shape)}"
        )
    difference = (latents.detach().double() - target.double()).flatten(1)
    return _rows(difference, "latent L2", 1).norm(dim=1)


def recognised(readings: Sequence[Reading], character: str) -> Tensor:
    """Return which images the reader takes for `character`, bool `(N,)`."""
    return torch.tensor([reading["character"] == character for reading in readings])
