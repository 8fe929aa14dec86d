"""Tiny random pipelines that run in well under a second and need no downloads."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from negtome_fast.config import NegToMeConfig

TEXT = 5
"""Number of text tokens of a prompt."""

ALWAYS = NegToMeConfig(threshold=0.1, t_end=0)
"""Guides every step, with a threshold that random tokens exceed."""


def flux_pipeline(seed: int = 0) -> FluxPipeline:
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet(seed: int, **settings: Any) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        **settings,
    ).eval()


def sd_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=_unet(seed),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    unet = _unet(
        seed,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
    )
    pipe = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Any,
    images: int = 4,
    *,
    size: tuple[int, int] = (64, 96),
    steps: int = 2,
    cfg: bool = False,
    latent_seed: int = 7,
    equal_latents: bool = False,
    **arguments: Any,
) -> torch.Tensor:
    """Latents of a run; `size` is (height, width) in pixels, 8 to a latent."""
    random = torch.Generator().manual_seed(3)
    embeds = torch.randn(1, TEXT, 16, generator=random).repeat(images, 1, 1)
    pooled = torch.randn(1, 16, generator=random).repeat(images, 1)
    negative, negative_pooled = -embeds, -pooled
    generators = [
        torch.Generator().manual_seed(latent_seed + (0 if equal_latents else i))
        for i in range(images)
    ]
    if isinstance(pipe, FluxPipeline):
        arguments.update(pooled_prompt_embeds=pooled, guidance_scale=1.0)
        if cfg:
            arguments.update(
                negative_prompt_embeds=negative,
                negative_pooled_prompt_embeds=negative_pooled,
                true_cfg_scale=3.0,
            )
    else:
        arguments["guidance_scale"] = 5.0 if cfg else 1.0
        arguments["negative_prompt_embeds"] = negative if cfg else None
        if isinstance(pipe, StableDiffusionXLPipeline):
            arguments["pooled_prompt_embeds"] = pooled
            arguments["negative_pooled_prompt_embeds"] = negative_pooled if cfg else None
    height, width = size
    with torch.no_grad():
        return pipe(
            prompt_embeds=embeds,
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=generators,
            output_type="latent",
            **arguments,
        ).images


FAMILIES = {"flux": flux_pipeline, "sd15": sd_pipeline, "sdxl": sdxl_pipeline}
_pipelines: dict[str, Any] = {}
_plain: dict[Any, Tensor] = {}


def built(family: str) -> Any:
    """The pipeline of a family, built once for all tests, which leave it unguided."""
    if family not in _pipelines:
        _pipelines[family] = FAMILIES[family]()
    return _pipelines[family]


def denoiser(pipe: Any) -> nn.Module:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def plain(family: str, **arguments: Any) -> Tensor:
    """The unguided latents, computed once for all tests."""
    key = (family, *sorted(arguments.items()))
    if key not in _plain:
        _plain[key] = generate(FAMILIES[family](), **arguments)
    return _plain[key]


def hook_count(pipe: Any) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(m, name)) for m in denoiser(pipe).modules() for name in names)


def reference_latents(pipe: Any, seed: int = 11) -> Tensor:
    """Clean latents for runs of 64 x 96 pixels."""
    shape = (1, 24, 16) if "Flux" in type(pipe).__name__ else (1, 4, 8, 12)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
