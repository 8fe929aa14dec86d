"""Token grids that several kinds of architecture find in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..layouts import ImageTokens


def patches(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Latents (B, C, H, W), the first tensor of the arguments, in square patches, row by row."""
    latents = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
    patch = getattr(model.config, "patch_size", 1)
    height, width = latents.shape[-2] // patch, latents.shape[-1] // patch
    return ImageTokens(height * width, height * width, (height, width))
