"""Tiny random pipelines that run in well under a second and need no downloads."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from helpers import families
from helpers.families.core import TEXT, denoiser
from negtome_fast.config import NegToMeConfig

ALWAYS = NegToMeConfig(threshold=0.1, t_end=0)
"""Guides every step, with a threshold that random tokens exceed."""


def pipeline(name: str, part: str, seed: int) -> Any:
    """Return a family's pipeline whose denoiser has the weights that diffusers gives it."""
    family = families.FAMILIES[name]
    torch.manual_seed(seed)
    model = family.denoiser.cls(**family.denoiser.config()).eval()
    return family.build(**{part: model})


def flux_pipeline(seed: int = 0) -> FluxPipeline:
    return pipeline("flux", "transformer", seed)


def sd_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    return pipeline("sd15", "unet", seed)


def sdxl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    return pipeline("sdxl", "unet", seed)


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
    """Return the latents of a run; `size` is (height, width) in pixels, 8 to a latent."""
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
    """Return the pipeline of a family. It is built once for all tests, which leave it unguided."""
    if family not in _pipelines:
        _pipelines[family] = FAMILIES[family]()
    return _pipelines[family]


def plain(family: str, **arguments: Any) -> Tensor:
    """Return the unguided latents. They are computed once for all tests."""
    key = (family, *sorted(arguments.items()))
    if key not in _plain:
        _plain[key] = generate(FAMILIES[family](), **arguments)
    return _plain[key]


def hook_count(pipe: Any) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(m, name)) for m in denoiser(pipe).modules() for name in names)


def reference_latents(pipe: Any, seed: int = 11) -> Tensor:
    """Return clean latents for runs of 64 x 96 pixels."""
    shape = (1, 24, 16) if "Flux" in type(pipe).__name__ else (1, 4, 8, 12)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
