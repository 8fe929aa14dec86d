"""One tiny random pipeline for each family of image models, without downloads: `FAMILIES`.

tests/test_families.py runs all of them, and those of pipeline_families_video.py, through the same
tests. Where a pipeline cannot run offline, `DenoiserLoop` calls its denoiser as the pipeline would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = seeded(
        FluxTransformer2DModel,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    return quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=transformer,
        )
    )


def generate_flux(
    pipe: Any, images: int, *, size: Size, steps: int, cfg: bool, captions: Any, seed: int
) -> Tensor:
    text, pooled = prompt(images, 16), embeddings(1, 16).repeat(images, 1)
    negative = {
        "negative_prompt_embeds": -text,
        "negative_pooled_prompt_embeds": -pooled,
        "true_cfg_scale": 3.0,
    }
    return pipe(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        generator=noise_generators(images, seed),
        output_type="latent",
        **(negative if cfg else {}),
    ).images


FAMILIES: dict[str, Family] = {
    "flux": Family(
        "FluxTransformer2DModel", flux, generate_flux, {(64, 96): {(4, 6)}, (80, 32): {(5, 2)}}
    ),
}
