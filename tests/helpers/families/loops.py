"""Families whose pipelines cannot run offline: `FAMILIES`. A plain loop calls their denoisers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from helpers.families.core import (
    TEXT,
    TWO_RESOLUTIONS,
    Denoiser,
    Family,
    LoopFamily,
    Part,
    Run,
    embeddings,
    noise,
)
from helpers.families.images import QWEN, UNET_XL, Z_IMAGE, long_captions
from helpers.families.videos import FRAMES, HUNYUAN, PIXELS_32, WAN

JOYIMAGE = {"rope_dim_list": (2, 2, 4)}


def packed(run: Run) -> tuple[int, ...]:
    """Return the shape of packed latents: tokens of 16 x 16 pixels with 16 channels."""
    height, width = run.grid(16)
    return height * width, 16


def unpacked(run: Run) -> tuple[int, ...]:
    """Return the shape of latents with 4 channels and 8 x 8 pixels to a latent."""
    return 4, *run.grid(8)


def qwen_with(given: Any) -> Any:
    """Return a function of Qwen-Image's arguments, with the tokens of given images at the end.

    `given(run)` returns the number of these tokens, and the `img_shapes` of one item.
    """

    def arguments(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
        tokens, shapes = given(run)
        return {
            "hidden_states": torch.cat([latents, run.given(tokens, 16, seed=5)], dim=1),
            "timestep": timesteps / 1000,
            "encoder_hidden_states": run.text(),
            "encoder_hidden_states_mask": run.mask(),
            "img_shapes": [shapes] * run.images,
        }

    return arguments


def two_layers(run: Run) -> tuple[int, ...]:
    """Return the shape of the latents of two layers, one after the other."""
    tokens, channels = packed(run)
    return 2 * tokens, channels


def kolors(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    added = {
        "text_embeds": run.both(run.pooled()),
        "time_ids": torch.tensor([[*run.size, 0, 0, *run.size]]).repeat(run.batch, 1),
    }
    return {
        "sample": latents,
        "timestep": timesteps,
        "encoder_hidden_states": run.both(run.text()),
        "added_cond_kwargs": added,
    }


def omnigen(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    """Return OmniGen's arguments. Its captions are padded on the left."""
    height, width = run.grid(16)
    tokens, length = height * width + 1, max(run.captions)
    padding = [length - caption for caption in run.captions]
    positions = [torch.arange(length + tokens).sub(pad).clamp(min=0) for pad in padding]
    visible = torch.stack([(torch.arange(length + tokens) >= pad) * 1.0 for pad in padding])
    ids = torch.arange(1, length + 1).repeat(run.images, 1) % 10
    return {
        "hidden_states": latents,
        "timestep": timesteps,
        "input_ids": torch.cat([9 - ids, ids])[-run.batch :],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": run.repeated(visible[:, None].repeat(1, length + tokens, 1)),
        "position_ids": run.repeated(torch.stack(positions)),
    }


def ideogram4(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    """Return Ideogram 4's arguments: 12 tokens with the caption at their end, then the image."""
    from diffusers import Ideogram4Pipeline

    height, width = run.grid(16)
    length = 12
    text = run.text(tokens=length)
    places, segments, kinds = Ideogram4Pipeline._prepare_ids(
        list(run.captions), height, width, length, torch.device("cpu")
    )
    return {
        "hidden_states": nn.functional.pad(latents, (0, 0, length, 0)),
        "timestep": (1 - timesteps / 1000).to(latents.dtype),
        "encoder_hidden_states": nn.functional.pad(text, (0, 0, 0, height * width)),
        "position_ids": places,
        "segment_ids": segments,
        "indicator": kinds,
    }


def joyimage(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    """Return JoyImage-Edit's arguments: the image to edit, then the generated one."""
    given = run.given(4, 1, *run.grid(8), seed=5)
    return {
        "hidden_states": torch.stack([given, latents[:, :, None]], dim=1),
        "timestep": timesteps,
        "encoder_hidden_states": run.text(),
    }


def joyimage_plus(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    """Return JoyImage-Edit Plus's arguments: patches of the generated image, then of others.

    Every other image has a second image to edit, where the others have padding.
    """
    sizes = [(1, *run.grid(16)), (1, 2, 4), (1, 3, 1)]
    given = run.given(8 + 3, *latents.shape[2:], seed=5)
    given[1::2, 8:] = 0
    return {
        "hidden_states": torch.cat([latents, run.repeated(given)], dim=1),
        "timestep": timesteps,
        "encoder_hidden_states": run.both(run.text()),
        "encoder_hidden_states_mask": run.repeated(run.mask()),
        "shape_list": [sizes[: 3 - item % 2] for item in range(run.images)]
        * (run.batch // run.images),
    }


def bria_fibo(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    height, width = run.grid(16)
    text = run.both(run.text())
    return {
        "hidden_states": latents,
        "timestep": timesteps,
        "encoder_hidden_states": text,
        "text_encoder_layers": [text] * 4,
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": torch.cartesian_prod(*map(torch.arange, (1, height, width))).float(),
    }


def z_image_omni(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    """Return Z-Image Omni's arguments: the captions, a given image, then the generated one."""
    given = embeddings(4, 1, 4, 8, seed=5)
    return {
        "x": [[given, item[:, None]] for item in latents],
        "t": 1 - timesteps / 1000,
        "cap_feats": [[text, embeddings(3, 16)] for text in long_captions(run)],
        "siglip_feats": [[embeddings(2, 2, 16), None]] * run.images,
        "image_noise_mask": [[0, 1]] * run.images,
    }


def frames(run: Run, count: int = FRAMES) -> tuple[int, ...]:
    """Return the shape of `unpacked` latents of `count` frames."""
    return 4, count, *run.grid(8)


def wan_like(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "timestep": timesteps,
        "encoder_hidden_states": run.text(),
    }


def wan_vace(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    return wan_like(run, latents, timesteps) | {"control_hidden_states": run.given(*frames(run))}


def hunyuan_video(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "timestep": timesteps,
        "encoder_hidden_states": run.text(),
        "encoder_attention_mask": run.mask(),
        "pooled_projections": run.pooled(8),
    }


def token_replace(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    """Return HunyuanVideo's arguments. The given image is the first frame."""
    given = run.given(*frames(run, 1))
    return hunyuan_video(run, torch.cat([given, latents], dim=2), timesteps)


def framepack(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    """Return FramePack's arguments: ten frames of the past at three resolutions come first."""
    past = {"latents_history_4x": (0, 5), "latents_history_2x": (5, 8), "latents_clean": (8, 10)}
    places = {**past, "latents": (10, 10 + FRAMES)}
    return {
        **hunyuan_video(run, latents, timesteps),
        "image_embeds": run.text(8, tokens=2),
        **{name: run.given(*frames(run, end - start)) for name, (start, end) in past.items()},
        **{f"indices_{name}": torch.arange(*place) for name, place in places.items()},
    }


def consisid(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    """Return ConsisID's arguments. The given image is in further channels, the face in tokens."""
    image = run.repeated(run.given(FRAMES, 4, *run.grid(8)))
    return {
        "hidden_states": torch.cat([latents, image], dim=2),
        "encoder_hidden_states": run.both(run.text()),
        "timestep": timesteps,
        "id_cond": run.repeated(run.given(8)),
        "id_vit_hidden": [run.repeated(run.given(3, 8))] * 5,
    }


def ltx2(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    height, width = run.grid(32)
    text, mask = run.both(run.text()), run.repeated(run.mask())
    audio = noise(run.images, run.seed + 50, 7, 4)
    return {
        "hidden_states": latents,
        "audio_hidden_states": run.repeated(audio),
        "encoder_hidden_states": text,
        "audio_encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "timestep": timesteps,
        "num_frames": FRAMES,
        "height": height,
        "width": width,
        "audio_num_frames": 7,
    }


# Each entry is filled like a paragraph, so that the whole table can be seen at once.
# fmt: off
FAMILIES: dict[str, Family] = {
    # Tokens of the given image after the generated ones.
    "qwen-edit": LoopFamily(
        Denoiser("QwenImageTransformer2DModel", **QWEN, zero_cond_t=True), packed,
        qwen_with(lambda run: (8, [(1, *run.grid(16)), (1, 2, 4)])),
        answer=lambda output: output[:, :-8], cfg=False, several_captions=True, note="Edit"),
    # Its pipeline needs sentencepiece.
    "kolors": LoopFamily(
        Denoiser(
            "UNet2DConditionModel", **UNET_XL, encoder_hid_dim=16,
            encoder_hid_dim_type="text_proj"),
        unpacked, kolors, scheduler=Part("EulerDiscreteScheduler"), grids=TWO_RESOLUTIONS,
        note="Kolors"),
    # Its pipeline needs a tokenizer.
    "omnigen": LoopFamily(
        Denoiser(
            "OmniGenTransformer2DModel", num_key_value_heads=2, intermediate_size=32,
            pad_token_id=0, vocab_size=10, max_position_embeddings=64,
            original_max_position_embeddings=64,
            rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
            pos_embed_max_size=16, time_step_dim=16),
        unpacked, omnigen,
        scheduler=Part(
            "FlowMatchEulerDiscreteScheduler", invert_sigmas=True, num_train_timesteps=1),
        schedule=lambda steps: {"sigmas": [1 - step / steps for step in range(steps)]},
        several_captions=True, timesteps=lambda t: 1000 * (1 - t)),
    # Its pipeline takes words alone, and calls a second denoiser with the image alone.
    "ideogram4": LoopFamily(
        Denoiser(
            "Ideogram4Transformer2DModel", in_channels=16, intermediate_size=32, adaln_dim=16,
            llm_features_dim=16, mrope_section=(1, 1, 1)),
        packed, ideogram4, answer=lambda output: -output[:, 12:], cfg=False, several_captions=True),
    # Their pipelines round sizes to those of the training, or take no embeddings.
    "joyimage-edit": LoopFamily(
        Denoiser("JoyImageEditTransformer3DModel", **JOYIMAGE), unpacked, joyimage,
        answer=lambda output: output[:, -1, :, 0], cfg=False),
    "joyimage-edit-plus": LoopFamily(
        Denoiser("JoyImageEditPlusTransformer3DModel", **JOYIMAGE),
        lambda run: (math.prod(run.grid(16)), 4, 1, 2, 2), joyimage_plus,
        answer=lambda output: output[:, :-11], several_captions=True),
    # Its pipeline takes no embeddings.
    "bria-fibo": LoopFamily(
        Denoiser(
            "BriaFiboTransformer2DModel", in_channels=16, pooled_projection_dim=None,
            text_encoder_dim=16),
        packed, bria_fibo),
    # Two layers, then the picture that they are made of.
    "qwen-layered": LoopFamily(
        Denoiser("QwenImageTransformer2DModel", **QWEN, use_layer3d_rope=True), two_layers,
        qwen_with(lambda run: (packed(run)[0], [(1, *run.grid(16))] * 3)),
        answer=lambda output: output[:, :output.shape[1] // 3 * 2], frames=2, cfg=False,
        several_captions=True, note="Layered"),
    "z-image-omni": LoopFamily(
        Denoiser("ZImageTransformer2DModel", **Z_IMAGE, siglip_feat_dim=16), unpacked, z_image_omni,
        answer=lambda output: -torch.stack(list(output))[:, :, 0], cfg=False, several_captions=True,
        note="Omni"),
    "hunyuan video image-to-video": LoopFamily(
        Denoiser("HunyuanVideoTransformer3DModel", **HUNYUAN, image_condition_type="token_replace"),
        lambda run: frames(run, FRAMES - 1), token_replace, answer=lambda output: output[:, :, 1:],
        frames=FRAMES - 1, cfg=False, several_captions=True, note="image-to-video"),
    "framepack": LoopFamily(
        Denoiser(
            "HunyuanVideoFramepackTransformer3DModel", **HUNYUAN, has_image_proj=True,
            image_proj_dim=8, has_clean_x_embedder=True),
        frames, framepack, frames=FRAMES, cfg=False, several_captions=True),
    "consisid": LoopFamily(
        Denoiser(
            "ConsisIDTransformer3DModel", attention_head_dim=16, in_channels=8, time_embed_dim=8,
            sample_width=12, sample_height=8, sample_frames=4 * FRAMES - 3,
            max_text_seq_length=TEXT, is_train_face=True, cross_attn_interval=1,
            cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=8, LFE_vit_dim=8, LFE_depth=5,
            LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=4,
            LFE_output_dim=21, LFE_num_scale=5),
        lambda run: (FRAMES, 4, *run.grid(8)), consisid, scheduler=Part("CogVideoXDDIMScheduler"),
        frames=FRAMES),
    "ltx 2": LoopFamily(
        Denoiser(
            "LTX2VideoTransformer3DModel", attention_head_dim=16, cross_attention_dim=32,
            audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
            audio_attention_head_dim=8, audio_cross_attention_dim=16),
        lambda run: (FRAMES * math.prod(run.grid(32)), 4), ltx2, grids=PIXELS_32, frames=FRAMES,
        several_captions=True),
    "wan vace": LoopFamily(
        Denoiser("WanVACETransformer3DModel", **WAN, vace_layers=[0], vace_in_channels=4), frames,
        wan_vace, frames=FRAMES, cfg=False),
    "chronoedit": LoopFamily(
        Denoiser("ChronoEditTransformer3DModel", **WAN), frames, wan_like, frames=FRAMES,
        cfg=False),
}
# fmt: on
