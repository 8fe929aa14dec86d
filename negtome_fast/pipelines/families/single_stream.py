"""Models of one stream: image and text are one sequence in every block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..encoders import (
    IMAGE,
    PACKED_FRAME,
    ReferenceEncoder,
    one_frame,
    pack_pixels,
    patchify_and_normalise,
    pixels_first_and_normalise,
)
from ..image_tokens import grid_of_places, not_known
from ..layouts import ImageTokens, Layout, times_1000
from .grids import patches


def lumina2_image_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Finds each image after the last valid token of its caption; padding follows the image."""
    lengths = arguments["encoder_attention_mask"].sum(dim=1).tolist()
    return replace(patches(model, arguments), starts=tuple(int(length) for length in lengths))


def z_image_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads `x`, latents (C, F, H, W) per item.

    Image and caption are each padded to a multiple of 32 tokens, and the image comes first. In the
    omni model, an item of `x` is a list of images (None where there is none). The last one is
    generated, and the images follow all captions.
    """
    multiple = 32
    patch, frame_patch = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)

    def tokens(image: torch.Tensor) -> tuple[int, int, int]:
        frames, height, width = image.shape[-3:]
        return frames // frame_patch, height // patch, width // patch

    def padded(length: int) -> int:
        return -(-length // multiple) * multiple

    items = arguments["x"]
    omni = isinstance(items[0], (list, tuple))
    frames, height, width = tokens(items[0][-1] if omni else items[0])
    count = frames * height * width
    starts = None
    if omni:
        starts = tuple(
            sum(padded(len(caption)) for caption in captions)
            + sum(multiple if x is None else padded(math.prod(tokens(x))) for x in images[:-1])
            for captions, images in zip(arguments["cap_feats"], items, strict=True)
        )
    return ImageTokens(count, count, (height, width), frames, starts)


def krea2_image_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads `hidden_states` (B, N, C) and `position_ids` (text + N, 3) of (0, row, column)."""
    count = arguments["hidden_states"].shape[1]
    places = arguments["position_ids"][-count:]
    grid = grid_of_places(places[:, 1:])
    if grid is None or bool((places[:, 0] != places[0, 0]).any()):
        raise not_known(model, "its position_ids do not place the tokens of one image row by row")
    return ImageTokens(count, count, grid)


IDEOGRAM_IMAGE = 2
"""Kind of the image's tokens in `indicator`; captions have another, padding has 0."""


def ideogram4_image_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads `indicator` (B, S), the kind of each token, and `position_ids` (B, S, 3).

    The latents (B, S, C) have zeros where the captions are, which come first and end together.
    """
    kinds, places = arguments["indicator"], arguments["position_ids"]
    own = kinds == IDEOGRAM_IMAGE
    count = int(own[0].sum())
    start = own.shape[1] - count
    if not bool((own[:, start:].all() & ~own[:, :start].any()).all()):
        raise not_known(model, "its indicator does not put one image at the end of each item")
    grid = grid_of_places(places[0, start:, 1:])
    same = (places[:, start:] == places[:1, start:]).all()
    if grid is None or not bool(same & (places[:, start:, 0] == places[0, start, 0]).all()):
        raise not_known(model, "its position_ids do not place the tokens of one image row by row")
    return ImageTokens(own.shape[1], count, grid, offset=start)


LAYOUTS = {
    "Lumina2Transformer2DModel": Layout(
        family="Lumina-Image 2.0",
        scheduler_timestep=lambda value: (1 - value) * 1000,
        guidance="sequential",
        image_tokens=lumina2_image_tokens,
        captions="encoder_attention_mask",
        blocks=("layers.*",),
        fresh_outputs=True,
        encode=IMAGE,
    ),
    "ZImageTransformer2DModel": Layout(
        family="Z-Image (Turbo, Omni)",
        latents="x",
        timestep="t",
        scheduler_timestep=lambda value: (1 - value) * 1000,
        image_tokens=z_image_tokens,
        captions="cap_feats",
        joint="image_first",
        blocks=("layers.*",),
        fresh_outputs=True,
        encode=ReferenceEncoder(pack=one_frame),
    ),
    # Conditions and the time's token come first; the scheduler is inverted, 0 (noise) to 1.
    "OmniGenTransformer2DModel": Layout(
        family="OmniGen",
        scheduler_timestep=lambda value: (1 - value) * 1000,
        image_tokens=patches,
        joint="text_first",
        blocks=("layers.*",),
        fresh_outputs=True,
        encode=IMAGE,
    ),
    "Krea2Transformer2DModel": Layout(
        family="Krea 2",
        scheduler_timestep=times_1000,
        guidance="sequential",
        image_tokens=krea2_image_tokens,
        joint="text_first",
        blocks=("transformer_blocks.*",),
        fresh_outputs=True,
        encode=PACKED_FRAME,
    ),
    "Ideogram4Transformer2DModel": Layout(
        family="Ideogram 4",
        scheduler_timestep=lambda value: (1 - value) * 1000,
        guidance="sequential",
        image_tokens=ideogram4_image_tokens,
        joint="text_first",
        blocks=("layers.*",),
        fresh_outputs=True,
        encode=ReferenceEncoder(normalise=pixels_first_and_normalise, pack=pack_pixels, packing=2),
    ),
    "ErnieImageTransformer2DModel": Layout(
        family="ERNIE-Image",
        image_tokens=patches,
        joint="image_first",
        blocks=("layers.*",),
        fresh_outputs=True,
        encode=ReferenceEncoder(normalise=patchify_and_normalise),
    ),
}
