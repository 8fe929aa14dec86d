"""One tiny random pipeline for each family of image models, without downloads: `FAMILIES`.

tests/pipelines/test_families.py runs all of them, and those of pipeline_families_video.py, through
the same tests. Where a pipeline cannot run offline, `DenoiserLoop` calls its denoiser as the
pipeline would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Size = tuple[int, int]
TEXT = 5


@dataclass(frozen=True)
class Family:
    """A pipeline that the tests can build and run.

    Attributes:
        model: class name of the denoiser, a key of `negtome_fast.pipelines.known_layouts()`.
        build: makes the pipeline, or the `DenoiserLoop`, from a fixed seed.
        generate: (pipe, images, *, size, steps, cfg, captions, seed) -> latents, images first.
            `size` is (height, width) in pixels; `captions` the number of text tokens of each image;
            image i starts from the noise of seed + i, and nothing else depends on the seed.
            Without `cfg`, the model is called once a step with the images alone.
        grids: size in pixels -> the (height, width) of the tokens of the guided blocks. Written
            down by hand; no two sizes of a family have equal height and width.
        frames: of the latents.
        whole: whether the pipeline itself runs, and not its denoiser alone.
        cfg: whether it has classifier-free guidance.
        several_captions: whether the captions of one batch may have different lengths.
        timesteps: from those of the scheduler to 1000 (noise) to 0, where they differ.
        note: name in the table of supported models, where a class is tested in several ways.
    """

    model: str
    build: Callable[[], Any]
    generate: Callable[..., Tensor]
    grids: Mapping[Size, set[Size]]
    frames: int = 1
    whole: bool = True
    cfg: bool = True
    several_captions: bool = False
    timesteps: Callable[[float], float] = float
    note: str = ""


class DenoiserLoop:
    """The plainest sampling loop around a denoiser, with the attributes that a pipeline has."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        self.transformer = transformer
        self.scheduler = scheduler

    def __call__(
        self,
        latents: Tensor,
        predict: Callable[[Tensor, Tensor], Tensor],
        steps: int,
        **schedule: Any,
    ) -> Tensor:
        """`predict(latents, timestep)` calls the transformer and returns what `step` wants."""
        self.scheduler.set_timesteps(steps, **schedule)
        for timestep in self.scheduler.timesteps:
            prediction = predict(latents, timestep)
            latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return latents


def seeded(make: Callable[..., nn.Module], **settings: Any) -> Any:
    """A model with the same random weights every time; none is zero, so that no block is idle."""
    torch.manual_seed(0)
    model = make(**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def quiet(pipe: Any) -> Any:
    """The pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_generators(images: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(images)]


def noise(images: int, seed: int, *shape: int) -> Tensor:
    return torch.stack([torch.randn(shape, generator=g) for g in noise_generators(images, seed)])


def embeddings(*shape: int, seed: int = 3) -> Tensor:
    """Of a prompt, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompt(images: int, width: int, tokens: int = TEXT, seed: int = 3) -> Tensor:
    """The same prompt for each image: (images, tokens, width)."""
    return embeddings(1, tokens, width, seed=seed).repeat(images, 1, 1)


def caption_mask(captions: tuple[int, ...], tokens: int | None = None) -> Tensor:
    """(images, tokens) of 1 where the caption is, 0 after it."""
    lengths = torch.tensor(captions)[:, None]
    return (torch.arange(tokens or max(captions)) < lengths).long()


def runner(arguments: Callable[..., dict[str, Any]], **more: Any) -> Callable[..., Tensor]:
    """`Family.generate` for a pipeline that takes the usual arguments, those of `arguments(images,
    cfg, captions)` and `more`."""

    def generate(
        pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
    ) -> Tensor:
        return pipe(
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            generator=noise_generators(images, seed),
            output_type="latent",
            **arguments(images, cfg, captions),
            **more,
        ).images

    return generate


def flow_scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def pipeline(pipeline_class: Any, *absent: str, **parts: Any) -> Any:
    """A pipeline with these parts and without the absent ones."""
    return quiet(pipeline_class(**dict.fromkeys(absent), **parts))


FLUX_SIZE = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}
PACKED: dict[Size, set[Size]] = {(64, 96): {(4, 6)}, (80, 32): {(5, 2)}}
"""Grids of models with 16 pixels to a token."""


def flux(kontext: bool = False) -> Any:
    from diffusers import FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel

    return pipeline(
        FluxKontextPipeline if kontext else FluxPipeline,
        *("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        scheduler=flow_scheduler(),
        transformer=seeded(
            FluxTransformer2DModel,
            pooled_projection_dim=16,
            **{**FLUX_SIZE, "in_channels": 64 if kontext else 16},
        ),
    )


def flux_arguments(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    text, pooled = prompt(images, 16), embeddings(1, 16).repeat(images, 1)
    negative = {
        "negative_prompt_embeds": -text,
        "negative_pooled_prompt_embeds": -pooled,
        "true_cfg_scale": 3.0,
    }
    return {
        "prompt_embeds": text,
        "pooled_prompt_embeds": pooled,
        **(negative if cfg else {}),
    }


def generate_kontext(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    """The image to edit is smaller than the one that is made, and given as latents."""
    given = embeddings(1, 16, 4, 8, seed=5).repeat(images, 1, 1, 1)
    area = {"max_area": size[0] * size[1], "_auto_resize": False}
    generate = runner(flux_arguments, image=given, **area)
    return generate(pipe, images, size=size, steps=steps, cfg=cfg, captions=captions, seed=seed)


def flux2_vae() -> nn.Module:
    from diffusers import AutoencoderKLFlux2

    return seeded(
        AutoencoderKLFlux2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )


def flux2(klein: bool) -> Any:
    from diffusers import Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel

    settings = {**FLUX_SIZE, "axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 16}
    return pipeline(
        Flux2KleinPipeline if klein else Flux2Pipeline,
        *("text_encoder", "tokenizer"),
        vae=flux2_vae(),
        scheduler=flow_scheduler(),
        transformer=seeded(Flux2Transformer2DModel, guidance_embeds=not klein, **settings),
    )


def prompt_arguments(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    return {"prompt_embeds": prompt(images, 16)}


def guided_prompt_arguments(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    text = prompt(images, 16)
    return {
        "prompt_embeds": text,
        "negative_prompt_embeds": -text if cfg else None,
        "guidance_scale": 4.0 if cfg else 1.0,
    }


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = seeded(
        SD3Transformer2DModel,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return pipeline(
        StableDiffusion3Pipeline,
        *("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        *("text_encoder_3", "tokenizer_3"),
        scheduler=flow_scheduler(),
        transformer=transformer,
    )


def pooled_arguments(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    pooled = embeddings(1, 16).repeat(images, 1)
    return {
        **guided_prompt_arguments(images, cfg, captions),
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": -pooled if cfg else None,
    }


def qwen_transformer(**settings: Any) -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return seeded(
        QwenImageTransformer2DModel,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        **settings,
    )


def qwen() -> Any:
    from diffusers import QwenImagePipeline

    return pipeline(
        QwenImagePipeline,
        *("vae", "text_encoder", "tokenizer"),
        scheduler=flow_scheduler(),
        transformer=qwen_transformer(),
    )


def qwen_edit() -> DenoiserLoop:
    return DenoiserLoop(qwen_transformer(zero_cond_t=True), flow_scheduler())


def generate_qwen_edit(
    loop: DenoiserLoop,
    images: int,
    *,
    size: Size,
    steps: int,
    cfg: bool,
    captions: Any,
    seed: int,
) -> Tensor:
    """As the edit pipelines call it: tokens of the given image after the generated ones."""
    height, width = size[0] // 16, size[1] // 16
    given = embeddings(1, 8, 16, seed=5).repeat(images, 1, 1)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        prediction = loop.transformer(
            hidden_states=torch.cat([latents, given], dim=1),
            timestep=timestep.expand(images) / 1000,
            encoder_hidden_states=prompt(images, 16, max(captions)),
            encoder_hidden_states_mask=caption_mask(captions),
            img_shapes=[[(1, height, width), (1, 2, 4)]] * images,
            return_dict=False,
        )[0]
        return prediction[:, : latents.shape[1]]

    return loop(noise(images, seed, height * width, 16), predict, steps)


def qwen_arguments(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    text, mask = prompt(images, 16, max(captions)), caption_mask(captions)
    negative = {
        "negative_prompt_embeds": -text,
        "negative_prompt_embeds_mask": mask,
        "true_cfg_scale": 3.0,
    }
    return {
        "prompt_embeds": text,
        "prompt_embeds_mask": mask,
        **(negative if cfg else {}),
    }


def chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    transformer = seeded(
        ChromaTransformer2DModel,
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
        **FLUX_SIZE,
    )
    return pipeline(
        ChromaPipeline,
        *("vae", "text_encoder", "tokenizer"),
        scheduler=flow_scheduler(),
        transformer=transformer,
    )


def masked_prompt_arguments(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    text, mask = prompt(images, 16, max(captions)), caption_mask(captions).bool()
    return {
        "prompt_embeds": text,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": -text if cfg else None,
        "negative_prompt_attention_mask": mask if cfg else None,
        "guidance_scale": 4.0 if cfg else 1.0,
    }


def pixart(sigma: bool) -> Any:
    from diffusers import (
        DDPMScheduler,
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    transformer = seeded(
        PixArtTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        use_additional_conditions=False,
    )
    return pipeline(
        PixArtSigmaPipeline if sigma else PixArtAlphaPipeline,
        *("vae", "text_encoder", "tokenizer"),
        scheduler=DDPMScheduler(),
        transformer=transformer,
    )


def without_binning(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    """No negative prompt in words, and no rounding of the size to those that were trained."""
    return {
        **masked_prompt_arguments(images, cfg, captions),
        "negative_prompt": None,
        "use_resolution_binning": False,
    }


def sana(sprint: bool = False) -> Any:
    from diffusers import (
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaSprintPipeline,
        SanaTransformer2DModel,
        SCMScheduler,
    )

    transformer = seeded(
        SanaTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        guidance_embeds=sprint,
        qk_norm="rms_norm_across_heads" if sprint else None,
        timestep_scale=0.5,
    )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return pipeline(
        SanaSprintPipeline if sprint else SanaPipeline,
        *("vae", "text_encoder", "tokenizer"),
        scheduler=SCMScheduler() if sprint else DPMSolverMultistepScheduler(**flow),
        transformer=transformer,
    )


def sprint_arguments(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": prompt(images, 16, max(captions)),
        "prompt_attention_mask": caption_mask(captions),
        "use_resolution_binning": False,
        "intermediate_timesteps": None,
    }


def hunyuan_dit() -> Any:
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline

    transformer = seeded(
        HunyuanDiT2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=8,
        text_len_t5=8,
    )
    return pipeline(
        HunyuanDiTPipeline,
        *("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        *("safety_checker", "feature_extractor"),
        requires_safety_checker=False,
        scheduler=DDPMScheduler(),
        transformer=transformer,
    )


def hunyuan_dit_arguments(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    text, mask = prompt(images, 16, 8), caption_mask(captions, 8)
    encoded = {
        f"{kind}{name}{number}": (-text if kind and name.endswith("embeds") else text)
        if name.endswith("embeds")
        else mask
        for kind in ("", "negative_")
        for name in ("prompt_embeds", "prompt_attention_mask")
        for number in ("", "_2")
    }
    return {
        **encoded,
        "guidance_scale": 4.0 if cfg else 1.0,
        "use_resolution_binning": False,
    }


def lumina2() -> Any:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    transformer = seeded(
        Lumina2Transformer2DModel,
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(2, 2, 4),
        axes_lens=(32, 32, 32),
        cap_feat_dim=16,
    )
    return pipeline(
        Lumina2Pipeline,
        *("vae", "text_encoder", "tokenizer"),
        scheduler=flow_scheduler(),
        transformer=transformer,
    )


def lumina2_arguments(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    """The negative captions have other lengths."""
    arguments = masked_prompt_arguments(images, cfg, captions)
    if cfg:
        shorter = tuple(length - 1 for length in reversed(captions))
        arguments["negative_prompt_attention_mask"] = caption_mask(shorter, max(captions))
    arguments["prompt_attention_mask"] = arguments["prompt_attention_mask"].long()
    return arguments


def z_image() -> Any:
    from diffusers import ZImagePipeline

    return pipeline(
        ZImagePipeline,
        *("vae", "text_encoder", "tokenizer"),
        scheduler=flow_scheduler(),
        transformer=z_image_transformer(),
    )


def z_image_transformer(**settings: Any) -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    return seeded(
        ZImageTransformer2DModel,
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[2, 2, 4],
        axes_lens=[128, 32, 32],
        **settings,
    )


def z_image_arguments(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    """Captions on both sides of the multiple of 32 to which they are padded."""
    texts = [embeddings(10 * length, 16) for length in captions]
    return {
        "prompt_embeds": texts,
        "negative_prompt_embeds": [-text[:7] for text in texts] if cfg else [],
        "guidance_scale": 4.0 if cfg else 0.0,
    }


def aura_flow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    transformer = seeded(
        AuraFlowTransformer2DModel,
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return pipeline(
        AuraFlowPipeline,
        *("vae", "text_encoder", "tokenizer"),
        scheduler=flow_scheduler(),
        transformer=transformer,
    )


def cogview4() -> Any:
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel

    transformer = seeded(
        CogView4Transformer2DModel,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=32,
        rope_axes_dim=(8, 8),
    )
    return pipeline(
        CogView4Pipeline,
        *("vae", "text_encoder", "tokenizer"),
        scheduler=flow_scheduler(),
        transformer=transformer,
    )


def cogview3_plus() -> Any:
    from diffusers import (
        CogVideoXDDIMScheduler,
        CogView3PlusPipeline,
        CogView3PlusTransformer2DModel,
    )

    transformer = seeded(
        CogView3PlusTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=32,
        sample_size=8,
    )
    return pipeline(
        CogView3PlusPipeline,
        *("vae", "text_encoder", "tokenizer"),
        scheduler=CogVideoXDDIMScheduler(),
        transformer=transformer,
    )


def hidream() -> Any:
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel

    transformer = seeded(
        HiDreamImageTransformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[16, 16],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=[0, 1, 1],
    )
    encoders = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    pipe = pipeline(
        HiDreamImagePipeline,
        *("vae", *encoders, "text_encoder_4", "tokenizer_4"),
        scheduler=flow_scheduler(),
        transformer=transformer,
    )
    pipe.default_sample_size = 8  # every size is brought to the area of its square
    return pipe


def hidream_arguments(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    text = prompt(images, 16)
    llama = torch.stack([text, text.flip(1)])
    pooled = embeddings(1, 16).repeat(images, 1)
    negative = {
        "negative_prompt_embeds_t5": -text,
        "negative_prompt_embeds_llama3": -llama,
        "negative_pooled_prompt_embeds": -pooled,
    }
    return {
        "prompt_embeds_t5": text,
        "prompt_embeds_llama3": llama,
        "pooled_prompt_embeds": pooled,
        "guidance_scale": 4.0 if cfg else 1.0,
        **(negative if cfg else {}),
    }


def omnigen() -> DenoiserLoop:
    from diffusers import FlowMatchEulerDiscreteScheduler, OmniGenTransformer2DModel

    transformer = seeded(
        OmniGenTransformer2DModel,
        in_channels=4,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=2,
        pad_token_id=0,
        vocab_size=10,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        pos_embed_max_size=16,
        time_step_dim=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1)
    return DenoiserLoop(transformer, scheduler)


def generate_omnigen(
    loop: DenoiserLoop,
    images: int,
    *,
    size: Size,
    steps: int,
    cfg: bool,
    captions: Any,
    seed: int,
) -> Tensor:
    """As its pipeline calls it, which needs a tokenizer: captions padded on the left."""
    height, width = size[0] // 8, size[1] // 8
    tokens = height * width // 4 + 1
    length = max(captions)
    ids = torch.arange(1, length + 1).repeat(images, 1) % 10
    position_ids = torch.stack(
        [
            torch.cat([torch.zeros(length - own, dtype=torch.long), torch.arange(own + tokens)])
            for own in captions
        ]
    )
    visible = torch.ones(images, length + tokens, length + tokens)
    for item, own in enumerate(captions):
        visible[item, :, : length - own] = 0

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        parts = 2 if cfg else 1
        prediction = loop.transformer(
            hidden_states=latents.repeat(parts, 1, 1, 1),
            timestep=timestep.expand(parts * images),
            input_ids=torch.cat([ids, 9 - ids])[: parts * images],
            input_img_latents=[],
            input_image_sizes={},
            attention_mask=visible.repeat(parts, 1, 1),
            position_ids=position_ids.repeat(parts, 1),
            return_dict=False,
        )[0]
        if not cfg:
            return prediction
        conditioned, unconditioned = prediction.chunk(2)
        return unconditioned + 2.5 * (conditioned - unconditioned)

    sigmas = [1 - step / steps for step in range(steps)]
    return loop(noise(images, seed, 4, height, width), predict, steps, sigmas=sigmas)


def unet_pipeline(name: str) -> Any:
    from helpers import pipelines_fixtures

    return getattr(pipelines_fixtures, name)()


def kolors() -> DenoiserLoop:
    """Its pipeline needs sentencepiece."""
    from diffusers import EulerDiscreteScheduler

    from helpers.pipelines_fixtures import _unet

    unet = _unet(
        0,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        encoder_hid_dim=16,
        encoder_hid_dim_type="text_proj",
        use_linear_projection=True,
    )
    return DenoiserLoop(unet, EulerDiscreteScheduler())


def generate_kolors(
    loop: DenoiserLoop,
    images: int,
    *,
    size: Size,
    steps: int,
    cfg: bool,
    captions: Any,
    seed: int,
) -> Tensor:
    parts = 2 if cfg else 1
    text, pooled = prompt(images, 16), embeddings(1, 16).repeat(images, 1)
    added = {
        "text_embeds": torch.cat([-pooled, pooled][-parts:]),
        "time_ids": torch.tensor([[*size, 0, 0, *size]]).repeat(parts * images, 1),
    }

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        scaled = loop.scheduler.scale_model_input(latents.repeat(parts, 1, 1, 1), timestep)
        prediction = loop.transformer(
            scaled,
            timestep,
            encoder_hidden_states=torch.cat([-text, text][-parts:]),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        if not cfg:
            return prediction
        unconditioned, conditioned = prediction.chunk(2)
        return unconditioned + 5 * (conditioned - unconditioned)

    return loop(noise(images, seed, 4, size[0] // 8, size[1] // 8), predict, steps)


def bria() -> Any:
    from diffusers import AutoencoderKL, BriaPipeline, BriaTransformer2DModel

    vae = AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, shift_factor=0.0)
    return pipeline(
        BriaPipeline,
        *("text_encoder", "tokenizer"),
        vae=vae,
        scheduler=flow_scheduler(),
        transformer=seeded(BriaTransformer2DModel, **FLUX_SIZE),
    )


def bria_fibo() -> DenoiserLoop:
    """Its pipeline takes no embeddings."""
    from diffusers import BriaFiboTransformer2DModel

    transformer = seeded(BriaFiboTransformer2DModel, text_encoder_dim=16, **FLUX_SIZE)
    return DenoiserLoop(transformer, flow_scheduler())


def generate_bria_fibo(
    loop: DenoiserLoop,
    images: int,
    *,
    size: Size,
    steps: int,
    cfg: bool,
    captions: Any,
    seed: int,
) -> Tensor:
    height, width = size[0] // 16, size[1] // 16
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    parts = 2 if cfg else 1
    text = prompt(images, 16)
    text = torch.cat([-text, text][-parts:])

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        prediction = loop.transformer(
            hidden_states=latents.repeat(parts, 1, 1),
            timestep=timestep.expand(parts * images),
            encoder_hidden_states=text,
            text_encoder_layers=[text] * 4,
            txt_ids=torch.zeros(TEXT, 3),
            img_ids=ids,
            return_dict=False,
        )[0]
        if not cfg:
            return prediction
        unconditioned, conditioned = prediction.chunk(2)
        return unconditioned + 5 * (conditioned - unconditioned)

    return loop(noise(images, seed, height * width, 16), predict, steps)


def longcat() -> Any:
    """It always encodes words, here in place of its text encoder."""
    from diffusers import LongCatImagePipeline, LongCatImageTransformer2DModel

    class Pipeline(LongCatImagePipeline):
        def _encode_prompt(self, words: list[str]) -> Tensor:
            return prompt(len(words), 16, seed=3 if words[0] else 4)

    return pipeline(
        Pipeline,
        *("vae", "text_encoder", "tokenizer", "text_processor"),
        scheduler=flow_scheduler(),
        transformer=seeded(
            LongCatImageTransformer2DModel,
            pooled_projection_dim=16,
            **{**FLUX_SIZE, "in_channels": 64},
        ),
    )


def longcat_arguments(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    return {
        "prompt": "a cat",
        "num_images_per_prompt": images,
        "guidance_scale": 4.0 if cfg else 1.0,
        "enable_prompt_rewrite": False,
    }


def ovis() -> Any:
    from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

    return pipeline(
        OvisImagePipeline,
        *("vae", "text_encoder", "tokenizer"),
        scheduler=flow_scheduler(),
        transformer=seeded(OvisImageTransformer2DModel, out_channels=16, **FLUX_SIZE),
    )


def hunyuan_image() -> Any:
    from diffusers import (
        AdaptiveProjectedMixGuidance,
        HunyuanImagePipeline,
        HunyuanImageTransformer2DModel,
    )

    transformer = seeded(
        HunyuanImageTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(4, 4),
    )
    return pipeline(
        HunyuanImagePipeline,
        *("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        scheduler=flow_scheduler(),
        transformer=transformer,
        guider=AdaptiveProjectedMixGuidance(),
    )


def generate_hunyuan_image(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    pipe.guider._enabled = cfg
    text, mask = prompt(images, 16, max(captions)), caption_mask(captions)
    encoded = {
        f"{kind}prompt_embeds{what}{number}": mask if what else (-text if kind else text)
        for kind in ("", "negative_")
        for what in ("", "_mask")
        for number in ("", "_2")
    }
    generate = runner(lambda *_: encoded)
    return generate(pipe, images, size=size, steps=steps, cfg=cfg, captions=captions, seed=seed)


def glm_image() -> Any:
    from diffusers import GlmImagePipeline, GlmImageTransformer2DModel

    transformer = seeded(
        GlmImageTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=16,
    )
    return pipeline(
        GlmImagePipeline,
        *("vae", "text_encoder", "tokenizer", "processor", "vision_language_encoder"),
        scheduler=flow_scheduler(),
        transformer=transformer,
    )


def generate_glm_image(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    tokens = torch.arange(size[0] // 16 * (size[1] // 16)) % 16
    generate = runner(guided_prompt_arguments, prior_token_ids=tokens.repeat(images, 1))
    return generate(pipe, images, size=size, steps=steps, cfg=cfg, captions=captions, seed=seed)


def krea2() -> Any:
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel

    transformer = seeded(
        Krea2Transformer2DModel,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(2, 2, 4),
    )
    return pipeline(
        Krea2Pipeline,
        *("vae", "text_encoder", "tokenizer"),
        scheduler=flow_scheduler(),
        transformer=transformer,
    )


def krea2_arguments(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    text, mask = embeddings(1, max(captions), 2, 16), caption_mask(captions).bool()
    text = text.repeat(images, 1, 1, 1)
    negative = {"negative_prompt_embeds": -text, "negative_prompt_embeds_mask": mask}
    return {
        "prompt_embeds": text,
        "prompt_embeds_mask": mask,
        "guidance_scale": 4.0 if cfg else 0.0,
        **(negative if cfg else {}),
    }


def ernie() -> Any:
    from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel

    transformer = seeded(
        ErnieImageTransformer2DModel,
        hidden_size=16,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(2, 2, 4),
    )
    return pipeline(
        ErnieImagePipeline,
        *("text_encoder", "tokenizer"),
        vae=flux2_vae(),
        scheduler=flow_scheduler(),
        transformer=transformer,
    )


def ernie_arguments(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": [embeddings(length, 16) for length in captions],
        "negative_prompt_embeds": [embeddings(2, 16)] * images if cfg else None,
        "guidance_scale": 4.0 if cfg else 1.0,
    }


def flux2_klein_kv() -> Any:
    from diffusers import Flux2KleinKVPipeline

    pipe = flux2(klein=True)
    return pipeline(
        Flux2KleinKVPipeline,
        *("text_encoder", "tokenizer"),
        vae=pipe.vae,
        scheduler=flow_scheduler(),
        transformer=pipe.transformer,
    )


def generate_flux2_klein_kv(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    """The tokens of the image to edit come first, and only in the first step."""
    from PIL import Image

    generate = runner(prompt_arguments, image=Image.new("RGB", (64, 64), "red"))
    return generate(pipe, images, size=size, steps=steps, cfg=cfg, captions=captions, seed=seed)


def qwen_layered() -> DenoiserLoop:
    transformer = qwen_transformer(use_layer3d_rope=True)
    return DenoiserLoop(transformer, flow_scheduler())


def generate_qwen_layered(
    loop: DenoiserLoop,
    images: int,
    *,
    size: Size,
    steps: int,
    cfg: bool,
    captions: Any,
    seed: int,
) -> Tensor:
    """Two layers, then the picture that they are made of."""
    height, width = size[0] // 16, size[1] // 16
    given = embeddings(1, height * width, 16, seed=5).repeat(images, 1, 1)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        prediction = loop.transformer(
            hidden_states=torch.cat([latents, given], dim=1),
            timestep=timestep.expand(images) / 1000,
            encoder_hidden_states=prompt(images, 16, max(captions)),
            encoder_hidden_states_mask=caption_mask(captions),
            img_shapes=[[(1, height, width)] * 3] * images,
            return_dict=False,
        )[0]
        return prediction[:, : latents.shape[1]]

    return loop(noise(images, seed, 2 * height * width, 16), predict, steps)


def qwen21() -> Any:
    from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel

    transformer = seeded(
        QwenImage21Transformer2DModel,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(2, 2, 4),
    )

    class Processor:
        """Is asked for the template of prompts, which nothing here uses."""

        tokenizer = SimpleNamespace(encode=lambda words: [0])

        def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
            return [[0]]

    return pipeline(
        QwenImage21Pipeline,
        *("vae", "text_encoder"),
        processor=Processor(),
        scheduler=flow_scheduler(),
        transformer=transformer,
    )


def z_image_omni() -> DenoiserLoop:
    transformer = z_image_transformer(siglip_feat_dim=16)
    return DenoiserLoop(transformer, flow_scheduler())


def generate_z_image_omni(
    loop: DenoiserLoop,
    images: int,
    *,
    size: Size,
    steps: int,
    cfg: bool,
    captions: Any,
    seed: int,
) -> Tensor:
    """A given image before the generated one; captions of several lengths before both."""
    given = embeddings(4, 1, 4, 8, seed=5)
    texts = [[embeddings(10 * length, 16), embeddings(3, 16)] for length in captions]

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        predictions = loop.transformer(
            x=[[given, item[:, None]] for item in latents],
            t=1 - timestep.expand(images) / 1000,
            cap_feats=texts,
            siglip_feats=[[embeddings(2, 2, 16), None]] * images,
            image_noise_mask=[[0, 1]] * images,
            return_dict=False,
        )[0]
        return -torch.stack(list(predictions))[:, :, 0]

    return loop(noise(images, seed, 4, size[0] // 8, size[1] // 8), predict, steps)


def prx() -> Any:
    from diffusers import PRXPipeline, PRXTransformer2DModel

    transformer = seeded(
        PRXTransformer2DModel,
        in_channels=4,
        context_in_dim=16,
        hidden_size=16,
        num_heads=2,
        depth=2,
        axes_dim=[4, 4],
    )
    return pipeline(
        PRXPipeline,
        *("vae", "text_encoder", "tokenizer"),
        scheduler=flow_scheduler(),
        transformer=transformer,
    )


def nucleus() -> Any:
    from diffusers import NucleusMoEImagePipeline, NucleusMoEImageTransformer2DModel

    transformer = seeded(
        NucleusMoEImageTransformer2DModel,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        moe_enabled=False,
    )
    return pipeline(
        NucleusMoEImagePipeline,
        *("vae", "text_encoder", "processor"),
        scheduler=flow_scheduler(),
        transformer=transformer,
    )


def qwen21_arguments(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    arguments = qwen_arguments(images, cfg, captions)
    arguments["prompt_embeds_mask"] = arguments["prompt_embeds_mask"].bool()
    if cfg:
        arguments["negative_prompt_embeds_mask"] = arguments["prompt_embeds_mask"]
    return arguments


def nucleus_arguments(images: int, cfg: bool, captions: Any) -> dict[str, Any]:
    arguments = qwen_arguments(images, cfg, captions)
    arguments["guidance_scale"] = arguments.pop("true_cfg_scale", 1.0)
    return arguments


UNET: dict[Size, set[Size]] = {(64, 96): {(8, 12), (4, 6)}, (80, 32): {(10, 4), (5, 2)}}
"""Grids of UNets with attention at two resolutions."""


FAMILIES: dict[str, Family] = {
    "flux": Family("FluxTransformer2DModel", flux, runner(flux_arguments), PACKED),
    "flux-kontext": Family(
        "FluxTransformer2DModel", partial(flux, kontext=True), generate_kontext, PACKED
    ),
    "flux2": Family(
        "Flux2Transformer2DModel",
        partial(flux2, klein=False),
        runner(prompt_arguments),
        PACKED,
        cfg=False,
    ),
    "flux2-klein": Family(
        "Flux2Transformer2DModel",
        partial(flux2, klein=True),
        runner(guided_prompt_arguments),
        PACKED,
    ),
    "sd3": Family("SD3Transformer2DModel", sd3, runner(pooled_arguments), PACKED),
    "qwen": Family(
        "QwenImageTransformer2DModel",
        qwen,
        runner(qwen_arguments),
        PACKED,
        several_captions=True,
        note="Qwen-Image",
    ),
    "qwen-edit": Family(
        "QwenImageTransformer2DModel",
        qwen_edit,
        generate_qwen_edit,
        PACKED,
        whole=False,
        cfg=False,
        several_captions=True,
        note="Edit",
    ),
    "chroma": Family(
        "ChromaTransformer2DModel",
        chroma,
        runner(masked_prompt_arguments),
        PACKED,
        several_captions=True,
    ),
    "sd15": Family(
        "UNet2DConditionModel",
        partial(unet_pipeline, "sd_pipeline"),
        runner(guided_prompt_arguments),
        UNET,
        note="SD 1.5",
    ),
    "sdxl": Family(
        "UNet2DConditionModel",
        partial(unet_pipeline, "sdxl_pipeline"),
        runner(pooled_arguments),
        UNET,
        note="SDXL",
    ),
    "kolors": Family(
        "UNet2DConditionModel", kolors, generate_kolors, UNET, whole=False, note="Kolors"
    ),
    "pixart-alpha": Family(
        "PixArtTransformer2DModel",
        partial(pixart, sigma=False),
        runner(without_binning),
        PACKED,
        several_captions=True,
    ),
    "pixart-sigma": Family(
        "PixArtTransformer2DModel",
        partial(pixart, sigma=True),
        runner(without_binning),
        PACKED,
        several_captions=True,
    ),
    "sana": Family(
        "SanaTransformer2DModel",
        sana,
        runner(without_binning),
        {(64, 96): {(2, 3)}, (160, 64): {(5, 2)}},
        several_captions=True,
    ),
    "sana-sprint": Family(
        "SanaTransformer2DModel",
        partial(sana, sprint=True),
        runner(sprint_arguments),
        {(64, 96): {(2, 3)}, (160, 64): {(5, 2)}},
        cfg=False,
        several_captions=True,
        timesteps=lambda angle: 1000 * math.tan(angle) / (1 + math.tan(angle)),
    ),
    "hunyuan-dit": Family(
        "HunyuanDiT2DModel",
        hunyuan_dit,
        runner(hunyuan_dit_arguments),
        PACKED,
        several_captions=True,
    ),
    "lumina2": Family(
        "Lumina2Transformer2DModel",
        lumina2,
        runner(lumina2_arguments),
        PACKED,
        several_captions=True,
    ),
    "z-image": Family(
        "ZImageTransformer2DModel",
        z_image,
        runner(z_image_arguments),
        PACKED,
        several_captions=True,
        note="Z-Image",
    ),
    "auraflow": Family(
        "AuraFlowTransformer2DModel",
        aura_flow,
        runner(masked_prompt_arguments),
        PACKED,
    ),
    "cogview4": Family(
        "CogView4Transformer2DModel", cogview4, runner(guided_prompt_arguments), PACKED
    ),
    "cogview3-plus": Family(
        "CogView3PlusTransformer2DModel", cogview3_plus, runner(guided_prompt_arguments), PACKED
    ),
    "hidream": Family(
        "HiDreamImageTransformer2DModel",
        hidream,
        runner(hidream_arguments),
        {(32, 128): {(2, 8)}, (128, 32): {(8, 2)}, (64, 64): {(4, 4)}},
    ),
    "omnigen": Family(
        "OmniGenTransformer2DModel",
        omnigen,
        generate_omnigen,
        PACKED,
        whole=False,
        several_captions=True,
        timesteps=lambda t: 1000 * (1 - t),
    ),
    "bria": Family("BriaTransformer2DModel", bria, runner(guided_prompt_arguments), PACKED),
    "bria-fibo": Family(
        "BriaFiboTransformer2DModel", bria_fibo, generate_bria_fibo, PACKED, whole=False
    ),
    "longcat": Family(
        "LongCatImageTransformer2DModel",
        longcat,
        runner(longcat_arguments),
        PACKED,
    ),
    "ovis": Family(
        "OvisImageTransformer2DModel",
        ovis,
        runner(guided_prompt_arguments, negative_prompt=None),
        PACKED,
    ),
    "hunyuan-image": Family(
        "HunyuanImageTransformer2DModel",
        hunyuan_image,
        generate_hunyuan_image,
        {(128, 192): {(4, 6)}, (320, 128): {(10, 4)}},
        several_captions=True,
    ),
    "glm-image": Family(
        "GlmImageTransformer2DModel",
        glm_image,
        generate_glm_image,
        {(64, 96): {(4, 6)}, (96, 32): {(6, 2)}},
    ),
    "krea2": Family(
        "Krea2Transformer2DModel", krea2, runner(krea2_arguments), PACKED, several_captions=True
    ),
    "ernie": Family(
        "ErnieImageTransformer2DModel",
        ernie,
        runner(ernie_arguments),
        PACKED,
        several_captions=True,
    ),
    "flux2-klein-kv": Family(
        "Flux2Transformer2DModel", flux2_klein_kv, generate_flux2_klein_kv, PACKED, cfg=False
    ),
    "qwen-layered": Family(
        "QwenImageTransformer2DModel",
        qwen_layered,
        generate_qwen_layered,
        PACKED,
        frames=2,
        whole=False,
        cfg=False,
        several_captions=True,
        note="Layered",
    ),
    "qwen-2.1": Family(
        "QwenImage21Transformer2DModel",
        qwen21,
        runner(qwen21_arguments),
        {(64, 96): {(4, 6)}, (96, 32): {(6, 2)}},
        several_captions=True,
    ),
    "z-image-omni": Family(
        "ZImageTransformer2DModel",
        z_image_omni,
        generate_z_image_omni,
        PACKED,
        whole=False,
        cfg=False,
        several_captions=True,
        note="Omni",
    ),
    # Its pipeline does classifier-free guidance for a single image only.
    "prx": Family(
        "PRXTransformer2DModel",
        prx,
        runner(without_binning),
        PACKED,
        cfg=False,
        several_captions=True,
    ),
    "nucleus": Family(
        "NucleusMoEImageTransformer2DModel",
        nucleus,
        runner(nucleus_arguments),
        PACKED,
        several_captions=True,
    ),
}
