"""Measures on features `(N, C)`, logits and what the attribute reader saw, all in float64.

Diversity: pairwise cosine, Vendi score, entropy of attributes, recall. Quality: Frechet distance,
precision, inception-style score, agreement with the prompt. Likeness: cosine, L2, recognised.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.avatars import OPEN_ATTRIBUTES, attributes_in
from ..models.features import FEATURE_SIZE, FeatureExtractor

__all__ = [
    "FEATURE_SIZE",
    "FeatureExtractor",
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

#: One image as the attribute reader sees it: `{head: value}`.
Reading = dict[str, str]


def _rows(values: Tensor, name: str, least: int) -> Tensor:
    """`values` in float64, after a look at shape, count and finiteness."""
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
    """Mean cosine of all pairs of rows of `(N, C)`; lower is more diverse.

    Raises:
        ValueError: fewer than two rows, a row of zeros, or values that are not finite.
    """
    unit = _unit_rows(features, "pairwise cosine", 2)
    count = len(unit)
    return float((unit @ unit.T).triu(1).sum() / (count * (count - 1) / 2))


def vendi_score(features: Tensor) -> float:
    """Effective number of different rows of `(N, C)`: 1 where all are equal, N where orthogonal.

    `exp(-sum_i l_i log l_i)` over the eigenvalues `l` of the cosine kernel over N (Friedman and
    Dieng, arXiv 2210.02410, with the kernel `cos`).

    Raises:
        ValueError: no rows, a row of zeros, or values that are not finite.
    """
    unit = _unit_rows(features, "Vendi score", 1)
    # The smaller Gram matrix has the same eigenvalues, but for zeros.
    gram = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    eigenvalues = torch.linalg.eigvalsh(gram / len(unit)).clamp_min(0)
    return math.exp(float(torch.special.entr(eigenvalues).sum()))


def entropy(values: Sequence[str]) -> float:
    """Entropy in nats of the empirical distribution of `values`; 0 where all are equal.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("entropy needs at least one value")
    counts = Counter(values)
    return sum(n / len(values) * math.log(len(values) / n) for n in counts.values())


def attribute_entropy(readings: Sequence[Reading], names: Sequence[str] = OPEN_ATTRIBUTES) -> float:
    """Mean over `names` of the entropy, in nats, of what the reader saw in the images.

    Raises:
        ValueError: no readings or no names.
    """
    if not names:
        raise ValueError("attribute entropy needs at least one attribute")
    return sum(entropy([reading[name] for reading in readings]) for name in names) / len(names)


# Quality


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians that fit `a` and `b`, both `(N, C)`; lower is closer.

    `|m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)` with unbiased covariances. The last
    trace is the sum of the singular values of `X_a X_b^T / (N - 1)`, `X` the centred rows: no
    square root of a matrix is taken, so it is exact with fewer samples than channels as well.

    The estimate is too large by an amount that falls with N. Hence it takes the same number of
    samples on both sides, and only values at equal N compare. It is never to be called FID, which
    is this distance on Inception-v3 features.

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
    if len(a) > a.shape[1]:  # R of `X = Q R` has X's covariance in fewer rows
        a, b = torch.linalg.qr(a, mode="r").R, torch.linalg.qr(b, mode="r").R
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float(((mean_a - mean_b).square().sum() + traces - 2 * cross).clamp_min(0))


def inside_manifold(real: Tensor, generated: Tensor, k: int = 5) -> Tensor:
    """Which rows of `generated` lie in the manifold of `real`: bool `(N,)`.

    The manifold is the union of the balls around the rows of `real`, each as large as the distance
    to its k-th nearest other row (Kynkaanniemi et al., arXiv 1904.06991, equation 1).

    Raises:
        ValueError: not more than k rows in `real`, unequal widths, or values that are not finite.
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
    """Euclidean distances `(N, M)`; what rounding cannot tell from a copy is at distance 0."""
    centre = b.mean(0)
    a, b = a - centre, b - centre
    norms = a.square().sum(-1)[:, None] + b.square().sum(-1)
    squared = norms - 2 * (a @ b.T)
    return squared.masked_fill(squared < 1e-12 * norms, 0).sqrt()


def precision_recall(real: Tensor, generated: Tensor, k: int = 5) -> tuple[float, float]:
    """Share of `generated` inside of the manifold of `real`, and the other way round.

    Both depend on the number of rows that span the manifold: only values at equal numbers compare.
    See `inside_manifold`.
    """
    precision = inside_manifold(real, generated, k).double().mean()
    recall = inside_manifold(generated, real, k).double().mean()
    return float(precision), float(recall)


def inception_score(logits: Tensor) -> float:
    """Inception-style score of `(N, classes)`, from 1 to the number of classes.

    `exp(mean_x KL(p(y|x) || p(y)))` (Salimans et al., arXiv 1606.03498) over all N at once, with
    the classes of the network at hand: not comparable with published scores of Inception-v3.

    Raises:
        ValueError: fewer than two rows, or values that are not finite.
    """
    log_p = torch.log_softmax(_rows(logits, "inception-style score", 2), dim=-1)
    own = torch.special.entr(log_p.exp()).sum(-1).mean()
    marginal = torch.special.entr(log_p.exp().mean(0)).sum()
    return math.exp(max(0.0, float(marginal - own)))


def prompt_hits(readings: Sequence[Reading], prompts: str | Sequence[str]) -> Tensor:
    """Whether each image shows every attribute that its prompt names, its style included.

    Args:
        readings: of N images.
        prompts: one for all, or N.

    Returns:
        bool `(N,)`.
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
    """Share of images that show every attribute that `prompt` names, its style included.

    Raises:
        ValueError: no readings, or neither one prompt nor one for each.
    """
    if not readings:
        raise ValueError("prompt agreement needs at least one reading")
    return float(prompt_hits(readings, prompt).double().mean())


def contrast(images: Tensor) -> Tensor:
    """Mean difference of neighbouring pixels of (N, 3, H, W), in 256ths of the full scale; (N,)."""
    grey = images.mean(dim=1).double() * 255
    steps = [grey.diff(dim=axis).abs().flatten(1).mean(1) for axis in (1, 2)]
    return (steps[0] + steps[1]) / 2


# Likeness to a reference


def feature_cosine(features: Tensor, target: Tensor) -> Tensor:
    """Cosine of each row of `(N, C)` with `target`, `(C,)` or `(M, C)`: the closest of M; `(N,)`.

    Raises:
        ValueError: unequal widths, a row of zeros, or values that are not finite.
    """
    rows = _unit_rows(features, "feature cosine", 1)
    targets = _unit_rows(target[None] if target.dim() == 1 else target, "feature cosine", 1)
    _same_width(rows, targets, "feature cosine")
    return (rows @ targets.T).amax(dim=1)


def latent_l2(latents: Tensor, target: Tensor) -> Tensor:
    """Euclidean distance of each of `(N, ...)` to `target` `(...)`, in units of the latent; `(N,)`.

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
    """Which images the reader takes for `character`, bool `(N,)`; the mean is the share."""
    return torch.tensor([reading["character"] == character for reading in readings])
