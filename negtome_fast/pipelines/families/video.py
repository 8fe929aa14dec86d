"""Video models: most attention modules see the tokens of all frames at once.

Models that see one frame at a time (Latte, AnimateDiff) are guided in the same way: a frame's
tokens may be matched with any frame of the reference, and frames of one video are never pushed
apart. Attention along time alone is not guided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..encoders import (
    FRAMES,
    FRAMES_FIRST,
    PACKED_VIDEO,
    VIDEO,
    ReferenceEncoder,
    channels_last,
    frames_first,
)
from ..image_tokens import not_known
from ..layouts import ImageTokens, Layout

Counter = Callable[[nn.Module, Mapping[str, Any]], ImageTokens]


def reversed_timestep(value: float) -> float:
    """Returns the scheduler's timestep for a time input from 0 (noise) to 1000."""
    return 1000 - value


def given_tokens(timestep: Any, tokens: int) -> int:
    """Returns how many tokens, from the first on, have the time 0: those of the input image.

    Args:
        timestep: time of each token or frame, which some image-to-video models are told, in any
            shape that begins with the items.
        tokens: number of tokens in the image stream.
    """
    if not isinstance(timestep, torch.Tensor) or timestep.ndim < 2:
        return 0
    times = timestep[0].flatten()
    if tokens % len(times):
        return 0
    return int((times != 0).int().argmax()) * (tokens // len(times))


def times_agree(model: nn.Module, timestep: Any, image: ImageTokens) -> ImageTokens:
    """Returns the image tokens, unless some that they count as generated are given.

    Args:
        timestep: as in `given_tokens`.

    Raises:
        ValueError: a token after the first generated one has the time 0, and others have not.
    """
    if isinstance(timestep, torch.Tensor) and timestep.ndim > 1:
        times = timestep[0].flatten()
        if image.num_tokens % len(times) == 0 and bool((times != 0).any()):
            times = times.repeat_interleave(image.num_tokens // len(times))
            if bool((times[image.offset :][: image.generated] == 0).any()):
                raise not_known(model, "its timesteps say that frames between others are given")
    return image


def video_tokens(size: Sequence[int], patch: Sequence[int], given: int = 0) -> ImageTokens:
    """Counts the tokens of latents.

    Args:
        size: (frames, height, width) of the latents.
        patch: (frames, height, width) of a patch.
        given: number of tokens at the beginning that are not generated.
    """
    frames, height, width = (length // step for length, step in zip(size, patch, strict=True))
    tokens = frames * height * width
    generated = tokens - given
    if generated % (height * width):
        return ImageTokens(tokens, generated, offset=given)
    return ImageTokens(
        tokens, generated, (height, width), generated // (height * width), offset=given
    )


def _patches(model: nn.Module, *names: str) -> tuple[int, ...]:
    """Returns fields of the model's configuration, 1 for each that is not set."""
    return tuple(getattr(model.config, name, None) or 1 for name in names)


def wan_tokens(model: Any, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads latents (B, C, F, H, W) and the `patch_size` (time, height, width).

    Wan 2.2 5B and SANA-Video are told the time of each token, SkyReels V2 the time of each frame.
    """
    size, patch = arguments["hidden_states"].shape[2:], model.config.patch_size
    tokens = math.prod(length // step for length, step in zip(size, patch, strict=True))
    times = arguments.get("timestep")
    return times_agree(model, times, video_tokens(size, patch, given_tokens(times, tokens)))


def channels_first_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads latents (B, C, F, H, W), in patches of `patch_size_t` and `patch_size` squared."""
    patch = _patches(model, "patch_size_t", "patch_size", "patch_size")
    return video_tokens(arguments["hidden_states"].shape[2:], patch)


def frames_first_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads latents (B, F, C, H, W), CogVideoX's."""
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    patch = _patches(model, "patch_size_t", "patch_size", "patch_size")
    return video_tokens((frames, height, width), patch)


def hunyuan_video_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads latents (B, C, F, H, W); with token replacement the first frame is the input image."""
    size = arguments["hidden_states"].shape[2:]
    patch = _patches(model, "patch_size_t", "patch_size", "patch_size")
    replaced = getattr(model.config, "image_condition_type", None) == "token_replace"
    frame = (size[1] // patch[1]) * (size[2] // patch[2])
    return video_tokens(size, patch, frame if replaced else 0)


def framepack_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Counts earlier frames at three resolutions, which come before those that are generated."""
    own = channels_first_tokens(model, arguments)
    past = 0
    for name, patch in (
        ("latents_clean", (1, 2, 2)),
        ("latents_history_2x", (2, 4, 4)),
        ("latents_history_4x", (4, 8, 8)),
    ):
        latents = arguments.get(name)
        if latents is not None and arguments.get(f"indices_{name}") is not None:
            sizes = zip(latents.shape[2:], patch, strict=True)
            past += math.prod(-(-length // step) for length, step in sizes)
    return ImageTokens(own.num_tokens + past, own.generated, own.grid, own.frames, offset=past)


def ltx_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads packed latents (B, N, C).

    LTX-2 is given their size and appends conditions. For LTX the size follows from `video_coords`
    (B, 3, N) of (frame, row, column), and conditions, at time 0, come before.
    """
    tokens = arguments["hidden_states"].shape[1]
    times = arguments.get("timestep")
    return times_agree(model, times, _ltx_tokens(arguments, tokens, given_tokens(times, tokens)))


def _ltx_tokens(arguments: Mapping[str, Any], tokens: int, given: int) -> ImageTokens:
    size = [arguments[name] for name in ("num_frames", "height", "width") if arguments.get(name)]
    if len(size) == 3:
        return replace(video_tokens(size, (1, 1, 1), given), num_tokens=tokens)
    coordinates = arguments.get("video_coords")
    if coordinates is not None:
        # A coordinate may be a pair: where the token begins and where it ends.
        places = coordinates[0, :, given:].reshape(3, tokens - given, -1)[..., 0]
        frames, height, width = (axis.unique().numel() for axis in places)
        if frames * height * width == tokens - given:
            return ImageTokens(tokens, tokens - given, (height, width), frames, offset=given)
    return ImageTokens(tokens, tokens - given, offset=given)


def channels_last_tokens(model: Any, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads latents (B, F, H, W, C), Kandinsky 5's."""
    return video_tokens(arguments["hidden_states"].shape[1:4], model.config.patch_size)


def frame_unet_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads latents (B, C, F, H, W); the grids inside the UNet have as many frames."""
    return video_tokens(arguments["sample"].shape[2:], (1, 1, 1))


def stable_video_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads latents (B, F, C, H, W)."""
    frames, _, height, width = arguments["sample"].shape[1:]
    return video_tokens((frames, height, width), (1, 1, 1))


def cosmos_tokens(model: Any, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads latents (B, C, F, H, W); `condition_mask` (B, 1, F, H, W) is 1 in given frames."""
    size, mask = arguments["hidden_states"].shape[2:], arguments.get("condition_mask")
    whole = video_tokens(size, model.config.patch_size)
    if mask is None:
        return whole
    generated = mask[0, 0].flatten(1).amin(1) < 1
    given = int(generated.int().argmax())
    if not bool(generated[given:].all()):
        raise not_known(model, "its condition_mask says that frames between others are given")
    return video_tokens(size, model.config.patch_size, given * whole.num_tokens // whole.frames)


def _wan_like(family: str, image_tokens: Counter = wan_tokens, **settings: Any) -> Layout:
    return Layout(
        family=family,
        guidance="sequential",
        image_tokens=image_tokens,
        blocks=("blocks.*.attn1", "blocks.*.attn2"),
        fresh_outputs=True,
        **settings,
    )


def _joint(family: str, image_tokens: Counter, **settings: Any) -> Layout:
    """Returns the layout of models with video and text in one attention, which returns both."""
    return Layout(
        family=family,
        image_tokens=image_tokens,
        blocks=("transformer_blocks.*", "single_transformer_blocks.*"),
        fresh_outputs=True,
        **settings,
    )


def _crossed(family: str, image_tokens: Counter, **settings: Any) -> Layout:
    """Returns the layout of models that attend to the video, then to the text."""
    return Layout(
        family=family,
        image_tokens=image_tokens,
        blocks=("transformer_blocks.*.attn1", "transformer_blocks.*.attn2"),
        fresh_outputs=True,
        **settings,
    )


def _frame_unet(
    family: str,
    image_tokens: Counter = frame_unet_tokens,
    grid: str = "Transformer2DModel",
    **settings: Any,
) -> Layout:
    """Returns the layout of a UNet for images with attention along time added to it."""
    return Layout(
        family=family,
        latents="sample",
        image_tokens=image_tokens,
        grid_modules=(grid,),
        blocks=("*.attentions.*.attn1", "*.attentions.*.attn2"),
        fresh_outputs=True,
        preset="sdxl",
        **settings,
    )


LAYOUTS = {
    "WanTransformer3DModel": _wan_like("Wan 2.1, 2.2", encode=VIDEO),
    "WanVACETransformer3DModel": _wan_like("Wan VACE", encode=VIDEO),
    "ChronoEditTransformer3DModel": _wan_like("ChronoEdit", encode=VIDEO),
    "SkyReelsV2Transformer3DModel": _wan_like("SkyReels V2", encode=VIDEO),
    "HunyuanVideoTransformer3DModel": _joint(
        "HunyuanVideo, SkyReels V1", hunyuan_video_tokens, guidance="sequential", encode=VIDEO
    ),
    "HunyuanVideo15Transformer3DModel": _joint(
        "HunyuanVideo 1.5", channels_first_tokens, guidance="sequential", encode=VIDEO
    ),
    "HunyuanVideoFramepackTransformer3DModel": _joint(
        "FramePack", framepack_tokens, guidance="sequential", encode=VIDEO
    ),
    # The input of CogVideoX's output projection still holds the text.
    "CogVideoXTransformer3DModel": _joint(
        "CogVideoX", frames_first_tokens, joint="text_first", encode=FRAMES_FIRST
    ),
    "ConsisIDTransformer3DModel": _joint(
        "ConsisID", frames_first_tokens, joint="text_first", encode=FRAMES_FIRST
    ),
    "EasyAnimateTransformer3DModel": _joint("EasyAnimate", channels_first_tokens, encode=VIDEO),
    "MochiTransformer3DModel": _joint(
        "Mochi", channels_first_tokens, scheduler_timestep=reversed_timestep, encode=VIDEO
    ),
    "LTXVideoTransformer3DModel": _crossed("LTX-Video", ltx_tokens, encode=PACKED_VIDEO),
    "LTX2VideoTransformer3DModel": _crossed(
        "LTX-2 (the video, not the audio)", ltx_tokens, encode=PACKED_VIDEO
    ),
    "SanaVideoTransformer3DModel": _crossed("SANA-Video", wan_tokens, encode=VIDEO),
    "AllegroTransformer3DModel": _crossed("Allegro", channels_first_tokens, encode=VIDEO),
    "LatteTransformer3DModel": _crossed("Latte", channels_first_tokens, encode=FRAMES),
    "Kandinsky5Transformer3DModel": Layout(
        family="Kandinsky 5",
        guidance="sequential",
        image_tokens=channels_last_tokens,
        blocks=("visual_transformer_blocks.*",),
        fresh_outputs=True,
        encode=ReferenceEncoder(takes="video", pack=channels_last, frame_axis=1, grid_axes=(2, 3)),
    ),
    "UNetMotionModel": _frame_unet("AnimateDiff", encode=FRAMES),
    "UNet3DConditionModel": _frame_unet("ModelScope text-to-video, Zeroscope", encode=FRAMES),
    # Pipelines of these two use schedulers with several scales of time.
    "UNetSpatioTemporalConditionModel": replace(
        _frame_unet(
            "Stable Video Diffusion (windows in steps)",
            stable_video_tokens,
            "TransformerSpatioTemporalModel",
        ),
        scheduler_timestep=None,
        encode=ReferenceEncoder(takes="frames", pack=frames_first, frame_axis=1),
    ),
    "CosmosTransformer3DModel": Layout(
        family="Cosmos 1, 2, 2.5 (windows in steps where the scheduler has no timesteps)",
        scheduler_timestep=None,
        guidance="sequential",
        image_tokens=cosmos_tokens,
        blocks=("transformer_blocks.*.attn1", "transformer_blocks.*.attn2"),
    ),
}
