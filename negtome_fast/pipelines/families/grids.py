"""Token grids that several kinds of architecture find in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..layouts import ImageTokens


def patches(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Latents (B, C, H, W) or (B, C, F, H, W), the first tensor of the arguments, in patches.

    The configuration's `patch_size` is a number, (height, width) or (frames, height, width).
    """
    latents = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
    size: Any = getattr(model.config, "patch_size", 1)
    patch = (1, size, size) if isinstance(size, int) else (1, *size)[-3:]
    frames = latents.shape[2] // patch[0] if latents.ndim == 5 else 1
    height, width = latents.shape[-2] // patch[1], latents.shape[-1] // patch[2]
    count = frames * height * width
    return ImageTokens(count, count, (height, width), frames)
