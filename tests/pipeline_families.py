"""One tiny random pipeline for each family of image models, without downloads: `FAMILIES`.

tests/test_families.py runs all of them, and those of pipeline_families_video.py, through the same
tests. Where a pipeline cannot run offline, `DenoiserLoop` calls its denoiser as the pipeline would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
        note: what the table of supported models should say about the test, if anything.
    """

    model: str
    build: Callable[[], Any]
    generate: Callable[..., Tensor]
    grids: Mapping[Size, set[Size]]
    frames: int = 1
    whole: bool = True
    cfg: bool = True
    several_captions: bool = False
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


def flux2(klein: bool) -> Any:
    from diffusers import (
        AutoencoderKLFlux2,
        Flux2KleinPipeline,
        Flux2Pipeline,
        Flux2Transformer2DModel,
    )

    settings = {**FLUX_SIZE, "axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 16}
    vae = seeded(
        AutoencoderKLFlux2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    return pipeline(
        Flux2KleinPipeline if klein else Flux2Pipeline,
        *("text_encoder", "tokenizer"),
        vae=vae,
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
        "QwenImageTransformer2DModel", qwen, runner(qwen_arguments), PACKED, several_captions=True
    ),
    "qwen-edit": Family(
        "QwenImageTransformer2DModel",
        qwen_edit,
        generate_qwen_edit,
        PACKED,
        whole=False,
        cfg=False,
        several_captions=True,
    ),
    "chroma": Family(
        "ChromaTransformer2DModel",
        chroma,
        runner(masked_prompt_arguments),
        PACKED,
        several_captions=True,
    ),
}
