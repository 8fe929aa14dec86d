"""The measures, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from negtome_fast.studies import (
    FeatureExtractor,
    attribute_entropy,
    mean_pairwise_cosine,
    prompt_agreement,
)
from negtome_fast.studies.measures import entropy


def test_cosine_of_orthogonal_and_equal_rows() -> None:
    assert mean_pairwise_cosine(torch.eye(5)) == 0.0
    assert mean_pairwise_cosine(torch.ones(4, 7) * torch.arange(1, 5)[:, None]) == pytest.approx(1)
    angle = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)], [1.0, 0.0]])
    assert mean_pairwise_cosine(angle) == pytest.approx((0.5 + 1.0 + 0.5) / 3)


def test_cosine_of_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 2 rows, got \(1, 3\)"):
        mean_pairwise_cosine(torch.ones(1, 3))


def test_entropy_of_known_distributions() -> None:
    assert entropy(["a"] * 9) == 0.0
    assert entropy(["a", "b", "c", "d"]) == pytest.approx(math.log(4))
    expected = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert entropy(["a", "a", "a", "b"]) == pytest.approx(expected)


def test_attribute_entropy_is_the_mean_over_attributes() -> None:
    readings = [{"skin": s, "hair_color": "red"} for s in ("fair", "dark")]
    assert attribute_entropy(readings, ("skin", "hair_color")) == pytest.approx(math.log(2) / 2)


def test_prompt_agreement_needs_every_named_attribute() -> None:
    full = {"style": "voxel art", "skin": "dark", "hair_color": "red", "hair_shape": "long"}
    readings = [full, {**full, "skin": "fair"}, {**full, "hair_shape": "bun"}]
    assert prompt_agreement(readings, "a voxel art person") == 1.0
    assert prompt_agreement(readings, "a voxel art person with dark skin") == pytest.approx(2 / 3)
    assert prompt_agreement(readings, "a voxel art person with long red hair") == pytest.approx(
        2 / 3
    )
    assert prompt_agreement(readings, "a pixel art person") == 0.0


def test_features_tell_images_apart_and_ignore_the_batch() -> None:
    extractor = FeatureExtractor()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = extractor(images)
    assert features.shape == (3, 1280) and bool(features.isfinite().all())
    torch.testing.assert_close(extractor(images[1:2])[0], features[1], rtol=1e-3, atol=1e-4)
    assert mean_pairwise_cosine(features) < 0.9999
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        extractor(images[0])
