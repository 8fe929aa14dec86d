"""Families of image models: `FAMILIES`."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from helpers.families.core import (
    EVEN_PACKED,
    MASKED,
    MASKED_EMBEDS,
    PACKED_32,
    POOLED,
    TEXT,
    TEXT_ONLY,
    TRUE_CFG,
    TWO_RESOLUTIONS,
    Denoiser,
    Family,
    Part,
    PipelineFamily,
    Run,
    embeddings,
)

FLUX = {"in_channels": 16, "out_channels": None}
FLUX2 = FLUX | {"axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 16}
FLUX2_VAE = Part(
    "AutoencoderKLFlux2",
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(4,) * 4,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=2,
)
QWEN = {"in_channels": 16}
PIXART = {"out_channels": 8, "use_additional_conditions": False}
UNET = {
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "num_attention_heads": None,
    "attention_head_dim": 4,
}
UNET_XL = UNET | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
    "use_linear_projection": True,
}
Z_IMAGE = {
    "dim": 16,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": [2, 2, 4],
    "axes_lens": [128, 32, 32],
}


def long_captions(run: Run) -> list[Tensor]:
    """Return captions whose lengths lie on both sides of a multiple of 32, Z-Image's padding."""
    return [embeddings(10 * length, 16) for length in run.captions]


def longcat() -> Any:
    """Return LongCat's pipeline, which accepts only words, with random embeddings for them."""
    from diffusers import LongCatImagePipeline

    class Pipeline(LongCatImagePipeline):
        def _encode_prompt(self, words: list[str]) -> Tensor:
            return embeddings(1, TEXT, 16, seed=3 if words[0] else 4).repeat(len(words), 1, 1)

    return Pipeline


class Processor:
    """Stand-in for the processor that Qwen-Image 2.1 asks for the template of its prompts."""

    tokenizer = SimpleNamespace(encode=lambda words: [0])

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0]]


def eight_tokens(run: Run) -> Tensor:
    return run.text(tokens=8)


def mask_of_eight(run: Run) -> Tensor:
    return run.mask(tokens=8)


def smaller_square(pipe: Any) -> None:
    """Make HiDream scale every size to the area of 8 x 8 latents."""
    pipe.default_sample_size = 8


def red_image(run: Run) -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 64), "red")


def hidream_llama(run: Run) -> Tensor:
    return torch.stack([run.text(), run.text().flip(1)])


def glm_tokens(run: Run) -> Tensor:
    return (torch.arange(math.prod(run.grid(16))) % 16).repeat(run.images, 1)


# Each entry is filled like a paragraph, so that the whole table can be seen at once.
# fmt: off
FAMILIES: dict[str, Family] = {
    "flux": PipelineFamily(
        Denoiser("FluxTransformer2DModel", **FLUX), "FluxPipeline", POOLED, scale=TRUE_CFG),
    # The image to edit is smaller than the one that is made, and given as latents.
    "flux-kontext": PipelineFamily(
        Denoiser("FluxTransformer2DModel", in_channels=64, out_channels=None),
        "FluxKontextPipeline", POOLED,
        more={
            "image": lambda run: run.given(16, 4, 8, seed=5),
            "max_area": lambda run: math.prod(run.size), "_auto_resize": False},
        scale=TRUE_CFG),
    "flux2": PipelineFamily(
        Denoiser("Flux2Transformer2DModel", **FLUX2, guidance_embeds=True), "Flux2Pipeline",
        TEXT_ONLY, scale=None, parts={"vae": FLUX2_VAE}, cfg=False),
    "flux2-klein": PipelineFamily(
        Denoiser("Flux2Transformer2DModel", **FLUX2), "Flux2KleinPipeline", TEXT_ONLY,
        parts={"vae": FLUX2_VAE}),
    "sd3": PipelineFamily(
        Denoiser(
            "SD3Transformer2DModel", sample_size=16, num_layers=3, pos_embed_max_size=16,
            dual_attention_layers=(0,), qk_norm="rms_norm"),
        "StableDiffusion3Pipeline", POOLED),
    "qwen": PipelineFamily(
        Denoiser("QwenImageTransformer2DModel", **QWEN), "QwenImagePipeline", MASKED_EMBEDS,
        scale=TRUE_CFG, several_captions=True, note="Qwen-Image"),
    "chroma": PipelineFamily(
        Denoiser(
            "ChromaTransformer2DModel", **FLUX, approximator_num_channels=16,
            approximator_hidden_dim=16, approximator_layers=1),
        "ChromaPipeline", MASKED | {"prompt_attention_mask": Run.visible}, several_captions=True),
    "sd15": PipelineFamily(
        Denoiser("UNet2DConditionModel", **UNET), "StableDiffusionPipeline", TEXT_ONLY,
        scheduler=Part("DDIMScheduler", steps_offset=1, clip_sample=False),
        parts={"requires_safety_checker": False}, grids=TWO_RESOLUTIONS, note="SD 1.5"),
    "sdxl": PipelineFamily(
        Denoiser("UNet2DConditionModel", **UNET_XL, transformer_layers_per_block=(1, 2)),
        "StableDiffusionXLPipeline", POOLED, scheduler=Part("EulerDiscreteScheduler"),
        parts={"add_watermarker": False}, grids=TWO_RESOLUTIONS, note="SDXL"),
    "pixart-alpha": PipelineFamily(
        Denoiser("PixArtTransformer2DModel", **PIXART), "PixArtAlphaPipeline", MASKED,
        scheduler=Part("DDPMScheduler"), several_captions=True),
    "pixart-sigma": PipelineFamily(
        Denoiser("PixArtTransformer2DModel", **PIXART), "PixArtSigmaPipeline", MASKED,
        scheduler=Part("DDPMScheduler"), several_captions=True),
    "sana": PipelineFamily(
        Denoiser("SanaTransformer2DModel", qk_norm=None, timestep_scale=0.5), "SanaPipeline",
        MASKED,
        scheduler=Part(
            "DPMSolverMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True),
        grids=PACKED_32, several_captions=True),
    "sana-sprint": PipelineFamily(
        Denoiser(
            "SanaTransformer2DModel", guidance_embeds=True, qk_norm="rms_norm_across_heads",
            timestep_scale=0.5),
        "SanaSprintPipeline", MASKED, more={"intermediate_timesteps": None}, scale=None,
        scheduler=Part("SCMScheduler"), grids=PACKED_32, cfg=False, several_captions=True,
        timesteps=lambda angle: 1000 * math.tan(angle) / (1 + math.tan(angle))),
    "hunyuan-dit": PipelineFamily(
        Denoiser(
            "HunyuanDiT2DModel", patch_size=2, cross_attention_dim_t5=16, text_len=8,
            text_len_t5=8),
        "HunyuanDiTPipeline",
        {"prompt_embeds": eight_tokens, "prompt_embeds_2": eight_tokens,
         "prompt_attention_mask": mask_of_eight, "prompt_attention_mask_2": mask_of_eight},
        scheduler=Part("DDPMScheduler"), parts={"requires_safety_checker": False},
        several_captions=True),
    "lumina2": PipelineFamily(
        Denoiser(
            "Lumina2Transformer2DModel", num_kv_heads=1, multiple_of=2, axes_dim_rope=(2, 2, 4),
            axes_lens=(32, 32, 32), cap_feat_dim=16),
        "Lumina2Pipeline", MASKED, several_captions=True),
    "z-image": PipelineFamily(
        Denoiser("ZImageTransformer2DModel", **Z_IMAGE), "ZImagePipeline",
        {"prompt_embeds": long_captions}, scale=("guidance_scale", 0.0), several_captions=True,
        note="Z-Image"),
    "auraflow": PipelineFamily(
        Denoiser(
            "AuraFlowTransformer2DModel", num_mmdit_layers=1, num_single_dit_layers=1,
            pos_embed_max_size=64),
        "AuraFlowPipeline", MASKED),
    "cogview4": PipelineFamily(
        Denoiser("CogView4Transformer2DModel", pos_embed_max_size=32, rope_axes_dim=(8, 8)),
        "CogView4Pipeline", TEXT_ONLY),
    "cogview3-plus": PipelineFamily(
        Denoiser("CogView3PlusTransformer2DModel", pos_embed_max_size=32), "CogView3PlusPipeline",
        TEXT_ONLY, scheduler=Part("CogVideoXDDIMScheduler")),
    "hidream": PipelineFamily(
        Denoiser(
            "HiDreamImageTransformer2DModel", patch_size=2, num_layers=1, caption_channels=[16, 16],
            text_emb_dim=16, num_routed_experts=2, num_activated_experts=2,
            axes_dims_rope=(4, 2, 2), max_resolution=(16, 16), llama_layers=[0, 1, 1]),
        "HiDreamImagePipeline",
        {
            "prompt_embeds_t5": Run.text, "prompt_embeds_llama3": hidream_llama,
            "pooled_prompt_embeds": Run.pooled},
        finish=smaller_square,
        grids={(32, 128): {(2, 8)}, (128, 32): {(8, 2)}, (64, 64): {(4, 4)}}),
    "bria": PipelineFamily(
        Denoiser("BriaTransformer2DModel", in_channels=16, pooled_projection_dim=None),
        "BriaPipeline", TEXT_ONLY,
        parts={
            "vae": Part(
                "AutoencoderKL", block_out_channels=(4,) * 4, norm_num_groups=2,
                shift_factor=0.0)}),
    "longcat": PipelineFamily(
        Denoiser("LongCatImageTransformer2DModel", in_channels=64), longcat, {},
        more={
            "prompt": "a cat", "num_images_per_prompt": lambda run: run.images,
            "enable_prompt_rewrite": False}),
    "ovis": PipelineFamily(
        Denoiser("OvisImageTransformer2DModel", in_channels=16, out_channels=16),
        "OvisImagePipeline", TEXT_ONLY),
    "hunyuan-image": PipelineFamily(
        Denoiser(
            "HunyuanImageTransformer2DModel", num_layers=1, num_single_layers=1,
            text_embed_2_dim=16, rope_axes_dim=(4, 4)),
        "HunyuanImagePipeline",
        {**MASKED_EMBEDS, "prompt_embeds_2": Run.text, "prompt_embeds_mask_2": Run.mask},
        scale=None, parts={"guider": Part("AdaptiveProjectedMixGuidance")},
        grids={(128, 192): {(4, 6)}, (320, 128): {(10, 4)}}, several_captions=True),
    "glm-image": PipelineFamily(
        Denoiser("GlmImageTransformer2DModel", prior_vq_quantizer_codebook_size=16),
        "GlmImagePipeline", TEXT_ONLY, more={"prior_token_ids": glm_tokens}, grids=EVEN_PACKED),
    "krea2": PipelineFamily(
        Denoiser(
            "Krea2Transformer2DModel", in_channels=16, num_key_value_heads=1, intermediate_size=32,
            timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2,
            text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=32,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1),
        "Krea2Pipeline",
        {
            "prompt_embeds": lambda run: run.given(max(run.captions), 2, 16),
            "prompt_embeds_mask": Run.visible},
        scale=("guidance_scale", 0.0), several_captions=True),
    "ernie": PipelineFamily(
        Denoiser(
            "ErnieImageTransformer2DModel", ffn_hidden_size=32, in_channels=16, out_channels=16,
            text_in_dim=16, rope_axes_dim=(2, 2, 4)),
        "ErnieImagePipeline",
        {"prompt_embeds": lambda run: [embeddings(length, 16) for length in run.captions]},
        parts={"vae": FLUX2_VAE}, several_captions=True),
    # The tokens of the image to edit come first, and only in the first step.
    "flux2-klein-kv": PipelineFamily(
        Denoiser("Flux2Transformer2DModel", **FLUX2), "Flux2KleinKVPipeline", TEXT_ONLY,
        more={"image": red_image}, scale=None, parts={"vae": FLUX2_VAE}, cfg=False),
    "qwen-2.1": PipelineFamily(
        Denoiser("QwenImage21Transformer2DModel", in_channels=16, out_channels=16),
        "QwenImage21Pipeline", {"prompt_embeds": Run.text, "prompt_embeds_mask": Run.visible},
        scale=TRUE_CFG, parts={"processor": Processor()}, grids=EVEN_PACKED, several_captions=True),
    # Its pipeline does classifier-free guidance for a single image only.
    "prx": PipelineFamily(
        Denoiser("PRXTransformer2DModel", num_heads=2, depth=2, axes_dim=[4, 4]), "PRXPipeline",
        MASKED, cfg=False, several_captions=True),
    "nucleus": PipelineFamily(
        Denoiser(
            "NucleusMoEImageTransformer2DModel", in_channels=16, num_key_value_heads=1,
            moe_enabled=False),
        "NucleusMoEImagePipeline", MASKED_EMBEDS, several_captions=True),
}
# fmt: on
