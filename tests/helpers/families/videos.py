"""Families of video models: `FAMILIES`. Item i of a batch is video i with all its frames."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from helpers.families.core import (
    EVEN_PACKED,
    MASKED,
    MASKED_EMBEDS,
    TEXT,
    TEXT_ONLY,
    TRUE_CFG,
    TWO_RESOLUTIONS,
    Denoiser,
    Family,
    Grids,
    Part,
    PipelineFamily,
    Run,
    embeddings,
)

FRAMES = 3
"""Number of frames in the latents."""
NINE_FRAMES = {"num_frames": 4 * FRAMES - 3}
PIXELS_32: Grids = {(64, 96): {(2, 3)}, (128, 32): {(4, 1)}}
"""Grids of models with 32 pixels to a token and sizes in multiples of 32."""

WAN = {"attention_head_dim": 16}
HUNYUAN = {
    "attention_head_dim": 16,
    "num_layers": 1,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
COGVIDEOX = Denoiser(
    "CogVideoXTransformer3DModel",
    attention_head_dim=16,
    time_embed_dim=8,
    use_rotary_positional_embeddings=True,
)
LTX = Denoiser("LTXVideoTransformer3DModel", attention_head_dim=16, cross_attention_dim=32)
DDIM = Part("DDIMScheduler", clip_sample=False)

WAN_VAE = Part(
    "AutoencoderKLWan",
    base_dim=4,
    z_dim=4,
    dim_mult=[1, 1, 1, 1],
    num_res_blocks=1,
    temperal_downsample=[False, True, True],
    latents_mean=[0.0] * 4,
    latents_std=[1.0] * 4,
)


class Ratios:
    """Stand-in for the VAE of a pipeline that reads its ratios, but neither encodes nor decodes."""

    def __init__(self, spatial: int) -> None:
        self.config = SimpleNamespace(latent_channels=4)
        self.spatial_compression_ratio = spatial
        self.temporal_compression_ratio = 4


video = partial(PipelineFamily, frames=FRAMES, more=NINE_FRAMES)
wan = partial(video, Denoiser("WanTransformer3DModel", **WAN), "WanPipeline", TEXT_ONLY)


def wan_image_to_video(by_token: bool, **settings: Any) -> Family:
    """Return Wan's family with a given image.

    The image is the first frame, at time 0 (`by_token`), or is in further channels. The model
    takes all tokens of the text but the last 512 for tokens of the image.
    """

    def without_clip(pipe: Any) -> None:
        pipe.encode_image = lambda image, device: embeddings(1, 4, 8)

    return PipelineFamily(
        Denoiser("WanTransformer3DModel", **WAN, **settings),
        "WanImageToVideoPipeline",
        {"prompt_embeds": lambda run: run.text(tokens=512)},
        more=NINE_FRAMES | {"image": lambda run: embeddings(1, 3, *run.size).sigmoid()},
        parts={"vae": WAN_VAE, "expand_timesteps": by_token},
        finish=without_clip,
        frames=FRAMES - by_token,
    )


def ltx_latents(run: Run) -> Tensor:
    """Return latents whose first frame is the same for all videos: the given image."""
    frame = math.prod(run.grid(32))
    return torch.cat([run.given(frame, 4), run.noise((FRAMES - 1) * frame, 4)], dim=1)


def lengths(run: Run) -> Tensor:
    """Return the first token of each caption, where all captions lie in one row."""
    return torch.arange(run.images + 1, dtype=torch.int32) * TEXT


# Each entry is filled like a paragraph, so that the whole table can be seen at once.
# fmt: off
FAMILIES: dict[str, Family] = {
    "wan": wan(),
    "wan times by token": wan(parts={"expand_timesteps": True}),
    # Wan 2.1.
    "wan image-to-video": wan_image_to_video(
        False, image_dim=8, added_kv_proj_dim=32, in_channels=12),
    # Wan 2.2 5B.
    "wan image-to-video by token": wan_image_to_video(True),
    "skyreels": video(
        Denoiser("SkyReelsV2Transformer3DModel", **WAN), "SkyReelsV2Pipeline", TEXT_ONLY),
    # Each frame has its own timestep.
    "skyreels diffusion forcing": video(
        Denoiser("SkyReelsV2Transformer3DModel", **WAN), "SkyReelsV2DiffusionForcingPipeline",
        TEXT_ONLY, more=NINE_FRAMES | {"base_num_frames": 4 * FRAMES - 3},
        scheduler=Part(
            "UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True,
            flow_shift=1.0)),
    "hunyuan video": video(
        Denoiser("HunyuanVideoTransformer3DModel", **HUNYUAN, guidance_embeds=True),
        "HunyuanVideoPipeline", MASKED | {"pooled_prompt_embeds": lambda run: run.pooled(8)},
        scale=TRUE_CFG, several_captions=True, note="text-to-video"),
    "hunyuan video 1.5": video(
        Denoiser(
            "HunyuanVideo15Transformer3DModel", attention_head_dim=16, in_channels=9,
            text_embed_2_dim=8, image_embed_dim=8, rope_axes_dim=(4, 6, 6)),
        "HunyuanVideo15Pipeline",
        MASKED_EMBEDS | {
            "prompt_embeds_2": lambda run: run.text(8, tokens=4),
            "prompt_embeds_mask_2": lambda run: torch.ones(run.images, 4, dtype=torch.long)},
        scale=None, parts={"vae": Ratios(16), "guider": Part("ClassifierFreeGuidance")},
        several_captions=True),
    "cogvideox": video(
        COGVIDEOX, "CogVideoXPipeline", TEXT_ONLY, scheduler=Part("CogVideoXDDIMScheduler")),
    # A patch has two frames.
    "cogvideox 1.5": video(
        Denoiser(COGVIDEOX.name, **COGVIDEOX.settings, patch_size_t=2, patch_bias=False),
        "CogVideoXPipeline", TEXT_ONLY, scheduler=Part("CogVideoXDDIMScheduler"), frames=2),
    # The scheduler is that of the published model. It divides by half of the number of steps.
    "mochi": video(
        Denoiser("MochiTransformer3DModel", attention_head_dim=16, time_embed_dim=8),
        "MochiPipeline", MASKED, more={"num_frames": 6 * FRAMES - 5},
        scheduler=Part("FlowMatchEulerDiscreteScheduler", invert_sigmas=True), fewest_steps=2,
        several_captions=True, timesteps=lambda t: 1000 - t),
    "ltx": video(
        LTX, "LTXPipeline", MASKED, more={"num_frames": 8 * FRAMES - 7}, grids=PIXELS_32,
        several_captions=True),
    "ltx image-to-video": video(
        LTX, "LTXImageToVideoPipeline", MASKED,
        more={
            "image": lambda run: torch.zeros(1, 3, *run.size), "latents": ltx_latents,
            "num_frames": 8 * FRAMES - 7},
        grids=PIXELS_32, frames=FRAMES - 1, several_captions=True),
    "allegro": video(
        Denoiser(
            "AllegroTransformer3DModel", attention_head_dim=12, cross_attention_dim=24,
            sample_width=12, sample_height=8, sample_frames=FRAMES),
        "AllegroPipeline", MASKED, more={"num_frames": 4 * FRAMES},
        scheduler=Part("EulerAncestralDiscreteScheduler"), several_captions=True),
    "latte": video(
        Denoiser(
            "LatteTransformer3DModel", out_channels=8, attention_bias=True, patch_size=2,
            activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
            norm_elementwise_affine=False, video_length=FRAMES),
        "LattePipeline", TEXT_ONLY, more={"video_length": FRAMES, "mask_feature": False},
        scheduler=DDIM),
    "easyanimate": video(
        Denoiser(
            "EasyAnimateTransformer3DModel", attention_head_dim=16, patch_size=2, sample_width=12,
            sample_height=8, mmdit_layers=1, time_embed_dim=8),
        "EasyAnimatePipeline", MASKED, parts={"vae": Ratios(8)}),
    "animatediff": video(
        Denoiser(
            "UNetMotionModel", block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlockMotion",) * 2,
            up_block_types=("CrossAttnUpBlockMotion",) * 2, layers_per_block=1, norm_num_groups=4,
            motion_num_attention_heads=2),
        "AnimateDiffPipeline", TEXT_ONLY, more={"num_frames": FRAMES}, scheduler=DDIM,
        grids=TWO_RESOLUTIONS),
    "modelscope": video(
        Denoiser(
            "UNet3DConditionModel", block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock3D",) * 2,
            up_block_types=("CrossAttnUpBlock3D",) * 2, layers_per_block=1, norm_num_groups=4,
            num_attention_heads=None, attention_head_dim=4),
        "TextToVideoSDPipeline", TEXT_ONLY, more={"num_frames": FRAMES}, scheduler=DDIM,
        grids=TWO_RESOLUTIONS),
    "sana video": video(
        Denoiser(
            "SanaVideoTransformer3DModel", attention_head_dim=16, cross_attention_head_dim=16,
            cross_attention_dim=32),
        "SanaVideoPipeline", MASKED, more={"frames": 4 * FRAMES - 3}, grids=EVEN_PACKED,
        several_captions=True),
    "kandinsky 5": video(
        Denoiser(
            "Kandinsky5Transformer3DModel", in_visual_dim=4, out_visual_dim=4, in_text_dim=16,
            in_text_dim2=8, time_dim=16, model_dim=32, ff_dim=32, num_text_blocks=1,
            num_visual_blocks=2, axes_dims=(4, 6, 6)),
        "Kandinsky5T2VPipeline",
        {
            "prompt_embeds_qwen": Run.text, "prompt_embeds_clip": lambda run: run.pooled(8),
            "prompt_cu_seqlens": lengths}),
}
# fmt: on
