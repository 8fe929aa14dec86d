"""The measures against closed forms, and the image features that they are computed on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from negtome_fast.models.features import FeatureExtractor, encode
from negtome_fast.studies import measures


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(count: int, mean: Tensor, covariance: Tensor, seed: int = 0) -> Tensor:
    """Rows whose sample mean and unbiased covariance are exactly those asked for."""
    rows = torch.randn(count, len(mean), generator=generator(seed), dtype=torch.float64)
    rows = rows - rows.mean(0)
    white = rows @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(rows.T))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


# Diversity and agreement


def test_cosine_of_orthogonal_and_equal_rows() -> None:
    assert measures.mean_pairwise_cosine(torch.eye(5)) == 0.0
    assert measures.mean_pairwise_cosine(
        torch.ones(4, 7) * torch.arange(1, 5)[:, None]
    ) == pytest.approx(1)
    angle = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)], [1.0, 0.0]])
    assert measures.mean_pairwise_cosine(angle) == pytest.approx((0.5 + 1.0 + 0.5) / 3)


def test_cosine_of_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 2 rows, got \(1, 3\)"):
        measures.mean_pairwise_cosine(torch.ones(1, 3))


def test_entropy_of_known_distributions() -> None:
    assert measures.entropy(["a"] * 9) == 0.0
    assert measures.entropy(["a", "b", "c", "d"]) == pytest.approx(math.log(4))
    expected = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert measures.entropy(["a", "a", "a", "b"]) == pytest.approx(expected)


def test_attribute_entropy_is_the_mean_over_attributes() -> None:
    readings = [{"skin": s, "hair_color": "red"} for s in ("fair", "dark")]
    assert measures.attribute_entropy(readings, ("skin", "hair_color")) == pytest.approx(
        math.log(2) / 2
    )


def test_prompt_agreement_needs_every_named_attribute() -> None:
    full = {"style": "voxel art", "skin": "dark", "hair_color": "red", "hair_shape": "long"}
    readings = [full, {**full, "skin": "fair"}, {**full, "hair_shape": "bun"}]
    assert measures.prompt_agreement(readings, "a voxel art person") == 1.0
    assert measures.prompt_agreement(
        readings, "a voxel art person with dark skin"
    ) == pytest.approx(2 / 3)
    assert measures.prompt_agreement(
        readings, "a voxel art person with long red hair"
    ) == pytest.approx(2 / 3)
    assert measures.prompt_agreement(readings, "a pixel art person") == 0.0


# Frechet distance


def test_frechet_distance_of_gaussians_with_one_basis() -> None:
    variances_a, variances_b = torch.tensor([4.0, 1.0, 9.0]), torch.tensor([1.0, 1.0, 0.25])
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    a = gaussian(50, mean, variances_a.diag().double(), 1)
    b = gaussian(50, torch.zeros(3).double(), variances_b.diag().double(), 2)
    expected = mean.square().sum() + (variances_a.sqrt() - variances_b.sqrt()).square().sum()
    assert measures.frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)


def test_frechet_distance_of_gaussians_that_do_not_commute() -> None:
    one = torch.tensor([[2.0, 0.9], [0.9, 1.0]]).double()
    two = torch.tensor([[1.0, -0.5], [-0.5, 3.0]]).double()
    zero = torch.zeros(2).double()
    # For 2 x 2 matrices, tr M^(1/2) = (tr M + 2 (det M)^(1/2))^(1/2).
    product = one @ two
    root = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    expected = float(one.trace() + two.trace() - 2 * root)
    found = measures.frechet_distance(gaussian(9, zero, one, 3), gaussian(9, zero, two, 4))
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("channels", [5, 200], ids=["more samples", "more channels"])
def test_frechet_distance_knows_no_difference_between_bases(channels: int) -> None:
    a, b = (torch.randn(20, 5, generator=generator(s), dtype=torch.float64) for s in (0, 1))
    basis = torch.linalg.qr(torch.randn(channels, 5, generator=generator(2)).double()).Q
    expected = measures.frechet_distance(a, 2 * b + 1)
    assert measures.frechet_distance(a @ basis.T, (2 * b + 1) @ basis.T) == pytest.approx(expected)
    assert measures.frechet_distance(a @ basis.T, a @ basis.T) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 6))
    a, b = (torch.rand(40, 3, 8, 8, generator=generator(s)) for s in (0, 1))
    metric = fid.FrechetInceptionDistance(encoder, normalize=True, input_img_size=(3, 8, 8))
    with torch.no_grad():
        metric.update(a, real=True)
        metric.update(b**2, real=False)
        found = measures.frechet_distance(encoder(a), encoder(b**2))
    assert found == pytest.approx(float(metric.compute()), rel=1e-5)


def test_frechet_distance_wants_equal_counts() -> None:
    rows = torch.rand(9, 3, generator=generator())
    with pytest.raises(ValueError, match="same number of samples on both sides, got 9 and 8"):
        measures.frechet_distance(rows, rows[:8])
    with pytest.raises(ValueError, match="3 and 2 channels"):
        measures.frechet_distance(rows, rows[:, :2])


# Precision and recall


def test_manifold_is_made_of_balls_to_the_kth_neighbour() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    # Radii with k = 1 are 1, 1, 1, 8; with k = 2 they are 2, 1, 2, 9.
    points = torch.tensor([[-0.9], [-1.1], [3.5], [17.9], [18.5], [1.5]])
    one = measures.inside_manifold(real, points, k=1)
    assert one.tolist() == [True, False, True, True, False, True]
    two = measures.inside_manifold(real, points, k=2)
    assert two.tolist() == [True, True, True, True, True, True]
    assert (
        measures.inside_manifold(real, torch.tensor([[19.1], [-2.1]]), k=2).tolist() == [False] * 2
    )


def test_precision_and_recall_of_a_mode_that_is_missing_and_one_that_is_invented() -> None:
    noise = 0.1 * torch.randn(120, 4, generator=generator())
    offsets = torch.eye(4)[:3] * 50
    real = noise[:60] + offsets[[0, 1]].repeat_interleave(30, 0)
    generated = noise[60:] + offsets[[0, 2]].repeat(30, 1)
    precision, recall = measures.precision_recall(real, generated, k=5)
    # Half of each side has no counterpart; of the other half most, not all, are covered.
    assert 0.35 < precision <= 0.5
    assert 0.35 < recall <= 0.5
    assert measures.precision_recall(real, real.clone()) == (1.0, 1.0)


def test_copies_are_inside_even_where_all_neighbours_are_copies() -> None:
    point = torch.randn(1, 1280, generator=generator()) * 100 + 1000
    real = torch.cat([point.expand(7, -1), point + 3])
    assert measures.inside_manifold(real, point, k=5).tolist() == [True]


def test_manifold_needs_more_rows_than_neighbours() -> None:
    rows = torch.rand(5, 3, generator=generator())
    with pytest.raises(ValueError, match=r"manifold of 5 neighbours needs .* at least 6 rows"):
        measures.inside_manifold(rows, rows)
    with pytest.raises(ValueError, match="k must be at least 1"):
        measures.inside_manifold(rows, rows, k=0)


# Scores


def test_inception_score_of_known_predictions() -> None:
    certain = 1e3 * torch.eye(10)
    assert measures.inception_score(certain) == pytest.approx(10)
    assert measures.inception_score(certain[[3] * 8]) == pytest.approx(1)
    assert measures.inception_score(torch.zeros(6, 10)) == pytest.approx(1)
    # p = (0.9, 0.1) and (0.1, 0.9): exp(log 2 - H(0.9)).
    unsure = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    expected = 2 * 0.9**0.9 * 0.1**0.1
    assert measures.inception_score(unsure) == pytest.approx(expected)


@pytest.mark.parametrize("channels", [6, 40], ids=["more rows", "more channels"])
def test_vendi_score_counts_what_differs(channels: int) -> None:
    basis = torch.linalg.qr(torch.randn(channels, 6, generator=generator()).double()).Q.T
    assert measures.vendi_score(basis) == pytest.approx(6)
    assert measures.vendi_score(basis[:1] * torch.arange(1, 9)[:, None]) == pytest.approx(1)
    # Orthogonal groups of 6, 3 and 1: the exponential of their entropy.
    groups = basis[[0] * 6 + [1] * 3 + [2]]
    shares = torch.tensor([0.6, 0.3, 0.1])
    assert measures.vendi_score(groups) == pytest.approx(
        float(torch.special.entr(shares).sum().exp())
    )


def test_prompts_are_kept_or_not_one_by_one() -> None:
    red = {"style": "voxel art", "skin": "dark", "hair_color": "red", "hair_shape": "long"}
    readings = [red, {**red, "hair_color": "black"}, red]
    prompts = ["a voxel art person with red hair"] * 2 + ["a pixel art person"]
    assert measures.prompt_hits(readings, prompts).tolist() == [True, False, False]
    assert measures.prompt_agreement(readings, prompts) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="3 readings need as many prompts, got 2"):
        measures.prompt_hits(readings, prompts[:2])


def test_likeness_to_a_target() -> None:
    features = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, -3.0]])
    one = measures.feature_cosine(features, torch.tensor([5.0, 0.0]))
    torch.testing.assert_close(one, torch.tensor([1.0, math.sqrt(0.5), 0.0]).double())
    closest = measures.feature_cosine(features, torch.tensor([[5.0, 0.0], [0.0, -1.0]]))
    torch.testing.assert_close(closest, torch.tensor([1.0, math.sqrt(0.5), 1.0]).double())

    latents = torch.zeros(2, 4, 3, 3)
    latents[1] = 0.5
    found = measures.latent_l2(latents, torch.zeros(4, 3, 3))
    torch.testing.assert_close(found, torch.tensor([0.0, 3.0]).double())
    with pytest.raises(ValueError, match=r"\(2, 4, 3, 3\) and \(4, 3\)"):
        measures.latent_l2(latents, torch.zeros(4, 3))

    readings = [{"character": name} for name in ("captain red", "none", "captain red")]
    assert measures.recognised(readings, "captain red").tolist() == [True, False, True]


@pytest.mark.parametrize(
    "measure",
    [
        measures.mean_pairwise_cosine,
        measures.vendi_score,
        measures.inception_score,
        lambda rows: measures.frechet_distance(rows, rows),
        lambda rows: measures.inside_manifold(rows, rows, k=1),
        lambda rows: measures.feature_cosine(rows, torch.ones(3)),
    ],
    ids=["cosine", "vendi", "inception", "frechet", "manifold", "likeness"],
)
def test_what_is_no_matrix_of_numbers_is_refused(measure: Callable[[Tensor], Any]) -> None:
    rows = torch.rand(6, 3, generator=generator())
    measure(rows)
    broken = rows.clone()
    broken[4, 1] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        measure(broken)
    with pytest.raises(ValueError, match=r"\(N, C\)"):
        measure(rows[None])
    with pytest.raises(ValueError, match="rows"):
        measure(rows[:0])


def test_a_row_without_direction_is_refused() -> None:
    rows = torch.eye(3)
    rows[1] = 0
    with pytest.raises(ValueError, match="row of zeros"):
        measures.mean_pairwise_cosine(rows)


def test_nothing_has_no_entropy_and_no_agreement() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        measures.entropy([])
    with pytest.raises(ValueError, match="at least one attribute"):
        measures.attribute_entropy([{"skin": "fair"}], ())
    with pytest.raises(ValueError, match="at least one reading"):
        measures.prompt_agreement([], "a pixel art person")


# Features


def test_logits_are_those_of_the_network() -> None:
    extractor = FeatureExtractor()
    images = torch.rand(2, 3, 96, 96, generator=generator())
    with torch.no_grad():
        expected = extractor.network(images * 2 - 1)
    torch.testing.assert_close(extractor.logits(extractor(images)), expected)


def test_any_encoder_gives_features() -> None:
    images = torch.rand(5, 3, 8, 8, generator=generator())
    rows = encode(lambda batch: batch.mean(dim=(2, 3)).double(), images, batch_size=2)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, images.mean(dim=(2, 3)))
    torch.testing.assert_close(encode(torch.nn.Identity(), images, batch_size=2), rows)
    with pytest.raises(
        ValueError, match=r"must return \(2, C\) or \(2, C, h, w\), got \(2, 3, 8\)"
    ):
        encode(lambda batch: batch.mean(dim=3), images, batch_size=2)
    with pytest.raises(ValueError, match="not finite"):
        encode(lambda batch: batch.mean(dim=(2, 3)).log() * torch.inf, images)
    with pytest.raises(ValueError, match="needs images"):
        encode(torch.nn.Identity(), images[:0])


def test_features_tell_images_apart_and_ignore_the_batch() -> None:
    extractor = FeatureExtractor()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = extractor(images)
    assert features.shape == (3, 1280) and bool(features.isfinite().all())
    torch.testing.assert_close(extractor(images[1:2])[0], features[1], rtol=1e-3, atol=1e-4)
    assert measures.mean_pairwise_cosine(features) < 0.9999
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        extractor(images[0])
