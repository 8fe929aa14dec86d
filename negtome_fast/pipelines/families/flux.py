"""FLUX and the models that are built as it is: double blocks, then single blocks, text first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .. import encoders
from ..layouts import ImageTokens, Layout, times_1000


def flux_image_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """FLUX.1: `hidden_states` (B, N, C) and `img_ids` (N, 3) of (image, row, column).

    Kontext appends the tokens of its input image with 1 in the first column.
    """
    stream = arguments["hidden_states"].shape[1]
    ids = arguments.get("img_ids")
    if ids is None:
        return ImageTokens(stream, stream)
    ids = ids[0] if ids.ndim == 3 else ids
    own = ids[ids[:, 0] == 0]
    generated = own.shape[0]
    if generated == 0 or not bool((ids[:generated, 0] == 0).all()):
        return ImageTokens(stream, stream)
    extent = own[:, 1:].amax(0) - own[:, 1:].amin(0)
    height, width = (int(length) + 1 for length in extent.tolist())
    return ImageTokens(stream, generated, (height, width) if height * width == generated else None)


LAYOUTS = {
    "FluxTransformer2DModel": Layout(
        family="FLUX.1 (dev, schnell, Kontext)",
        scheduler_timestep=times_1000,
        guidance="sequential",
        image_tokens=flux_image_tokens,
        joint="text_first",
        blocks=("transformer_blocks.*", "single_transformer_blocks.*"),
        fresh_outputs=True,
        preset="flux",
        encode=encoders.PACKED,
    ),
}
