"""Models whose image attends to itself, then to the text: attention outputs are all image."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..encoders import IMAGE, PACKED_FRAME
from ..layouts import Layout, times_1000
from .grids import patches, qwen_image_tokens


def adapt_sana(model: nn.Module, layout: Layout) -> Layout:
    """Returns the layout with the model's unit of time.

    Sana multiplies the timestep by a number of its configuration. The distilled Sprint models,
    which alone have guidance embeddings, are given 1 (noise) to 0, and 1 is rounded up a little.
    """
    if getattr(model.config, "guidance_embeds", False):
        return replace(layout, scheduler_timestep=lambda value: min(value * 1000, 1000))
    scale = float(getattr(model.config, "timestep_scale", 1.0))
    return replace(layout, scheduler_timestep=lambda value: value / scale)


IMAGE_ONLY = Layout(image_tokens=patches, blocks=("*.attn1", "*.attn2"), fresh_outputs=True)

LAYOUTS = {
    "PixArtTransformer2DModel": replace(IMAGE_ONLY, family="PixArt-alpha, -sigma", encode=IMAGE),
    "SanaTransformer2DModel": replace(
        IMAGE_ONLY, family="Sana, Sana-Sprint", adapt=adapt_sana, encode=IMAGE
    ),
    "HunyuanDiT2DModel": replace(IMAGE_ONLY, family="HunyuanDiT", encode=IMAGE),
    "PRXTransformer2DModel": replace(
        IMAGE_ONLY, family="PRX", scheduler_timestep=times_1000, blocks=("blocks.*",), encode=IMAGE
    ),
    "NucleusMoEImageTransformer2DModel": replace(
        IMAGE_ONLY,
        family="Nucleus-Image",
        scheduler_timestep=times_1000,
        guidance="sequential",
        image_tokens=qwen_image_tokens,
        blocks=("transformer_blocks.*",),
        encode=PACKED_FRAME,
    ),
}
