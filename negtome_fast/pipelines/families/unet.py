"""UNets: each resolution has its own grid, which the modules around the attention tell."""

from ..encoders import IMAGE
from ..layouts import Layout

LAYOUTS = {
    "UNet2DConditionModel": Layout(
        family="Stable Diffusion 1.5, 2.1, XL, Kolors",
        latents="sample",
        grid_modules=("Transformer2DModel",),
        blocks=("*.attn1", "*.attn2"),
        fresh_outputs=True,
        preset="sdxl",
        encode=IMAGE,
    ),
}
