"""`ImageEncoder`: an image encoder with a name, so that features of two encoders never mix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.features import FEATURE_SIZE, FeatureExtractor
from .images import BATCH


@dataclass(frozen=True)
class ImageEncoder:
    """An image encoder and the name under which a bank stores its features.

    Attributes:
        name: names model and preprocessing; features of different names are not compared.
        encode: `(B, 3, H, W)` in [0, 1] -> `(B, C)`; a callable or a torch module.
    """

    name: str
    encode: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features `(B, C)` fp32, computed in batches of 32 images."""
        parts = [self.encode(part) for part in images.split(BATCH)]
        if not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(
                f"the encoder {self.name!r} must return a tensor (B, C), it returned "
                f"{type(parts[0]).__name__}"
            )
        features = torch.cat([part.detach().float() for part in parts])
        if features.dim() != 2 or len(features) != len(images):
            raise ValueError(
                f"the encoder {self.name!r} must return (B, C); for {len(images)} images it "
                f"returned {tuple(features.shape)}"
            )
        return features


def default_encoder() -> ImageEncoder:
    """EfficientNet-lite0 at 96 px with ImageNet weights, which come with the extra `demo`."""
    return ImageEncoder(f"efficientnet-lite0@{FEATURE_SIZE}", FeatureExtractor())
