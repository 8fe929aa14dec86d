"""From pixels to the latents that a family's denoiser is given: `Encoder`, a field of `Layout`.

pixels in [-1, 1] -> VAE -> normalised latents -> the order of the model's argument
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..guidance import Grid

SPATIAL = (
    "vae_scale_factor_spatial",
    "vae_spatial_compression_ratio",
    "vae_spatial_scale_factor",
    "vae_scale_factor",
)
"""Names under which pipelines keep the pixels of a latent, and below the frames of one."""
TEMPORAL = (
    "vae_scale_factor_temporal",
    "vae_temporal_compression_ratio",
    "vae_temporal_scale_factor",
)


def as_they_are(latents: Tensor) -> Tensor:
    return latents


def pack_2x2(latents: Tensor) -> Tensor:
    """FLUX: (B, C, h, w), or of one frame, to tokens (B, h/2 * w/2, 4 C)."""
    if latents.ndim == 5:
        latents = latents.flatten(1, 2)
    items, channels, height, width = latents.shape
    patches = latents.view(items, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(items, -1, 4 * channels)


def normalise(vae: Any, latents: Tensor) -> Tensor:
    """The VAE's latents on the scale of the denoiser, by what the VAE's configuration tells."""
    config = vae.config
    scale = getattr(config, "scaling_factor", None) or 1.0
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return (latents - (getattr(config, "shift_factor", None) or 0.0)) * scale
    shape = (1, -1, *[1] * (latents.ndim - 2))
    mean, std = (latents.new_tensor(value).view(shape) for value in (mean, std))
    return (latents - mean) / std * scale


@dataclass(frozen=True)
class Encoder:
    """How pictures become the latents of a family.

    Attributes:
        video: the VAE takes (1, 3, F, H, W), also of one frame; else (1, 3, H, W).
        normalise: (vae, its latents) -> latents on the denoiser's scale.
        pack: those to the order of the model's argument, (1, tokens, channels) or (1, ...).
        packing: latents that a packed token has in each direction.
        frame_axis: of latents that are not packed and have frames.
    """

    video: bool = False
    normalise: Callable[[Any, Tensor], Tensor] = normalise
    pack: Callable[[Tensor], Tensor] = as_they_are
    packing: int = 1
    frame_axis: int = 2

    def size(
        self, pipe: Any, latents: Tensor, grid: Grid | None, frames: int
    ) -> tuple[int, int, int]:
        """(frames, height, width) in pixels of a run with these latents, items first.

        Args:
            grid, frames: of the image tokens, for latents that are packed.
        """
        packing = self.packing
        if latents.ndim != 3:
            packing, grid = 1, (latents.shape[-2], latents.shape[-1])
            frames = latents.shape[self.frame_axis] if latents.ndim == 5 else 1
        if grid is None:
            raise ValueError("the size of this run is not known; give the reference as latents")
        spatial = _factor(pipe, SPATIAL) * packing
        frames = (frames - 1) * _factor(pipe, TEMPORAL, 1) + 1
        return frames, grid[0] * spatial, grid[1] * spatial

    @torch.no_grad()
    def __call__(self, pipe: Any, pixels: Tensor) -> Tensor:
        """Latents (1, ...) in fp32 of pixels (F, 3, H, W) in [-1, 1]; draws no random numbers."""
        vae = pipe.vae
        weights = next(vae.parameters())
        dtype = weights.dtype
        # SDXL's VAE overflows in fp16; pipelines decode with it in fp32 as well.
        upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
        device = getattr(pipe, "_execution_device", weights.device)
        pixels = pixels.transpose(0, 1)[None] if self.video else pixels[:1]
        try:
            if upcast:
                vae.to(torch.float32)
            encoded = vae.encode(pixels.to(device, torch.float32 if upcast else dtype))
        finally:
            if upcast:
                vae.to(dtype)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        return self.pack(self.normalise(vae, latents.float()))


def _factor(pipe: Any, names: tuple[str, ...], default: int | None = None) -> int:
    found = next((getattr(pipe, name) for name in names if hasattr(pipe, name)), default)
    if found is None:
        raise ValueError(
            f"{type(pipe).__name__} does not tell how many pixels a latent has; give the reference "
            "as latents"
        )
    return int(found)


IMAGE = Encoder()
"""Latents (B, C, h, w) of a VAE for images: Stable Diffusion, PixArt, Sana, SD3 and others."""

PACKED = Encoder(pack=pack_2x2, packing=2)
"""FLUX.1: the same, packed into tokens of 2 x 2 latents."""
