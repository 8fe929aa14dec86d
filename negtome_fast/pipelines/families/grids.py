"""Token grids that are found in the same way in several kinds of architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..image_tokens import not_known
from ..layouts import ImageTokens


def patches(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Counts patches of `hidden_states` (B, C, H, W) or (B, C, F, H, W), or of the first tensor.

    The configuration's `patch_size` is a number, (height, width) or (frames, height, width).
    """
    latents = arguments.get("hidden_states")
    if not isinstance(latents, torch.Tensor):
        latents = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
    size: Any = getattr(model.config, "patch_size", 1)
    patch = (1, size, size) if isinstance(size, int) else (1, *size)[-3:]
    frames = latents.shape[2] // patch[0] if latents.ndim == 5 else 1
    height, width = latents.shape[-2] // patch[1], latents.shape[-1] // patch[2]
    count = frames * height * width
    return ImageTokens(count, count, (height, width), frames)


def qwen_image_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads `img_shapes`: per item, (frames, rows, columns) of the image and of images to edit.

    The layered model generates all but the last, as the layers of one picture.
    """
    num_tokens = arguments["hidden_states"].shape[1]
    shapes = arguments.get("img_shapes")
    if not shapes:
        return ImageTokens(num_tokens, num_tokens)
    own = shapes[0] if isinstance(shapes[0], (list, tuple)) and shapes[0] else shapes
    if not isinstance(own[0], (list, tuple)):
        own = [own]
    total = sum(math.prod(shape) for shape in own)
    if total != num_tokens:
        raise not_known(model, f"its img_shapes have {total} tokens, and its latents {num_tokens}")
    layered = len(own) > 1 and getattr(model.config, "use_layer3d_rope", False)
    own = own[:-1] if layered else own[:1]
    height, width = own[0][1:]
    if any(tuple(shape[1:]) != (height, width) for shape in own):
        raise not_known(model, f"its layers have the sizes {own}")
    frames = sum(shape[0] for shape in own)
    return ImageTokens(num_tokens, frames * height * width, (height, width), frames)
