"""Models of two streams that attend together: the attention returns (image, text)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..encoders import IMAGE, PACKED_FRAME, ReferenceEncoder, pack_pixels, standardise
from ..image_tokens import not_known
from ..layouts import ImageTokens, Layout, times_1000
from .grids import patches, qwen_image_tokens


def qwen21_image_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads the last of `img_shapes`, the generated image; images to edit are part of the text."""
    frames, height, width = arguments["img_shapes"][0][-1]
    count = frames * height * width
    return ImageTokens(count, count, (height, width), frames)


def hidream_image_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads latents (B, C, H, W), or patches (B, N, C) with `img_sizes`, (height, width) per item.

    Latents that are not square get padding tokens after the image, up to the model's maximum.
    """
    latents = arguments["hidden_states"]
    if latents.ndim == 3:
        sizes = arguments.get("img_sizes")
        if sizes is None:
            return ImageTokens(latents.shape[1], latents.shape[1])
        height, width = (int(length) for length in sizes[0])
        return ImageTokens(latents.shape[1], height * width, (height, width))
    image = patches(model, arguments)
    square = latents.shape[-2] == latents.shape[-1]
    longest: Any = model.max_seq
    return image if square else replace(image, num_tokens=longest)


def joyimage_tokens(model: Any, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads latents (B, images, C, F, H, W); the last image is generated.

    The model puts its tokens before those of the images to edit.
    """
    latents = arguments["hidden_states"]
    images = latents.shape[1] if latents.ndim == 6 else 1
    sizes = zip(latents.shape[-3:], model.config.patch_size, strict=True)
    frames, height, width = (length // step for length, step in sizes)
    count = frames * height * width
    return ImageTokens(images * count, count, (height, width), frames)


def joyimage_plus_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads `shape_list`: per item, (frames, rows, columns) of the generated image and of others.

    The latents (B, tokens, C, ...) are patches, padded after the images to edit.
    """
    own = {tuple(shapes[0]) for shapes in arguments["shape_list"]}
    if len(own) != 1:
        raise not_known(model, f"the images of a batch have the sizes {sorted(own)}")
    frames, height, width = own.pop()
    count = frames * height * width
    return ImageTokens(arguments["hidden_states"].shape[1], count, (height, width), frames)


TWO_STREAMS = Layout(image_tokens=patches, fresh_outputs=True)

LAYOUTS = {
    "SD3Transformer2DModel": replace(
        TWO_STREAMS,
        family="Stable Diffusion 3, 3.5",
        blocks=("transformer_blocks.*",),
        encode=IMAGE,
    ),
    "QwenImageTransformer2DModel": replace(
        TWO_STREAMS,
        family="Qwen-Image, Edit, Layered",
        scheduler_timestep=times_1000,
        guidance="sequential",
        image_tokens=qwen_image_tokens,
        blocks=("transformer_blocks.*",),
        encode=PACKED_FRAME,
    ),
    "QwenImage21Transformer2DModel": replace(
        TWO_STREAMS,
        family="Qwen-Image 2.1",
        scheduler_timestep=times_1000,
        guidance="sequential",
        image_tokens=qwen21_image_tokens,
        joint="text_first",
        blocks=("transformer_blocks.*",),
        encode=ReferenceEncoder(takes="video", normalise=standardise, pack=pack_pixels),
    ),
    # Before the output projection, the text is still there, before the image.
    "CogView3PlusTransformer2DModel": replace(
        TWO_STREAMS,
        family="CogView3-Plus",
        joint="text_first",
        blocks=("transformer_blocks.*",),
        encode=IMAGE,
    ),
    "CogView4Transformer2DModel": replace(
        TWO_STREAMS,
        family="CogView4",
        guidance="sequential",
        joint="text_first",
        blocks=("transformer_blocks.*",),
        encode=IMAGE,
    ),
    # Register tokens go with the text.
    "AuraFlowTransformer2DModel": replace(
        TWO_STREAMS,
        family="AuraFlow",
        scheduler_timestep=times_1000,
        joint="text_first",
        blocks=("joint_transformer_blocks.*", "single_transformer_blocks.*"),
        encode=IMAGE,
    ),
    "HunyuanImageTransformer2DModel": replace(
        TWO_STREAMS,
        family="HunyuanImage 2.1",
        guidance="sequential",
        blocks=("transformer_blocks.*", "single_transformer_blocks.*"),
        encode=IMAGE,
    ),
    "GlmImageTransformer2DModel": replace(
        TWO_STREAMS,
        family="GLM-Image",
        scheduler_timestep=lambda value: value + 1,
        guidance="sequential",
        joint="text_first",
        blocks=("transformer_blocks.*",),
        encode=ReferenceEncoder(normalise=standardise),
    ),
    "HiDreamImageTransformer2DModel": replace(
        TWO_STREAMS,
        family="HiDream-I1",
        timestep="timesteps",
        image_tokens=hidream_image_tokens,
        joint="image_first",
        blocks=("double_stream_blocks.*", "single_stream_blocks.*"),
        encode=IMAGE,
    ),
    "JoyImageEditTransformer3DModel": replace(
        TWO_STREAMS,
        family="JoyImage-Edit",
        guidance="sequential",
        image_tokens=joyimage_tokens,
        blocks=("double_blocks.*",),
    ),
    "JoyImageEditPlusTransformer3DModel": replace(
        TWO_STREAMS,
        family="JoyImage-Edit Plus",
        image_tokens=joyimage_plus_tokens,
        blocks=("double_blocks.*",),
    ),
}
