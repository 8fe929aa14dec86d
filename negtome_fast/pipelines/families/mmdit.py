"""Two streams that attend together; the attention returns (image, text)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..layouts import ImageTokens, Layout, times_1000
from .grids import patches


def qwen_image_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """`img_shapes`: for each item, (frames, rows, columns) of the image and of those to edit.

    The layered model generates all but the last as the layers of one picture.
    """
    stream = arguments["hidden_states"].shape[1]
    shapes = arguments.get("img_shapes")
    if not shapes:
        return ImageTokens(stream, stream)
    own = shapes[0] if isinstance(shapes[0], (list, tuple)) and shapes[0] else shapes
    if not isinstance(own[0], (list, tuple)):
        own = [own]
    layered = len(own) > 1 and getattr(model.config, "use_layer3d_rope", False)
    own = own[:-1] if layered else own[:1]
    frames, height, width = sum(shape[0] for shape in own), *own[0][1:]
    return ImageTokens(stream, frames * height * width, (height, width), frames)


SD3 = Layout(
    family="Stable Diffusion 3, 3.5",
    image_tokens=patches,
    blocks=("transformer_blocks.*",),
    fresh_outputs=True,
)
QWEN = Layout(
    family="Qwen-Image (Edit, Edit Plus, Layered)",
    scheduler_timestep=times_1000,
    guidance="sequential",
    image_tokens=qwen_image_tokens,
    blocks=("transformer_blocks.*",),
    fresh_outputs=True,
)

LAYOUTS = {
    "SD3Transformer2DModel": SD3,
    "QwenImageTransformer2DModel": QWEN,
}
