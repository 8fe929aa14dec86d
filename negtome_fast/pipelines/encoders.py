"""From pixels to the latents that a denoiser is given: `ReferenceEncoder`, a field of `Layout`.

pixels in [-1, 1] -> VAE -> normalised latents -> the order of the model's argument
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import Grid

SPATIAL = (
    "vae_scale_factor_spatial",
    "vae_spatial_compression_ratio",
    "vae_spatial_scale_factor",
    "vae_scale_factor",
)
"""Attributes of pipelines that may hold the number of pixels per latent, in height and width."""
TEMPORAL = (
    "vae_scale_factor_temporal",
    "vae_temporal_compression_ratio",
    "vae_temporal_scale_factor",
)
"""Attributes of pipelines that may hold the number of frames per latent frame."""


def as_they_are(latents: Tensor) -> Tensor:
    """Returns the latents."""
    return latents


def pack_2x2(latents: Tensor) -> Tensor:
    """FLUX: (B, C, h, w) or (B, C, 1, h, w) to tokens (B, h/2 * w/2, 4 C)."""
    if latents.ndim == 5:
        latents = latents.squeeze(2)
    items, channels, height, width = latents.shape
    patches = latents.view(items, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(items, -1, 4 * channels)


def pack_pixels(latents: Tensor) -> Tensor:
    """One token per latent: (B, C, h, w) or (B, C, F, h, w) to (B, F * h * w, C)."""
    return latents.flatten(2).transpose(1, 2)


def one_frame(latents: Tensor) -> Tensor:
    """Z-Image, where images are videos of one frame: (B, C, h, w) to (B, C, 1, h, w)."""
    return latents[:, :, None]


def frames_first(latents: Tensor) -> Tensor:
    """CogVideoX: (B, C, F, h, w) to (B, F, C, h, w)."""
    return latents.transpose(1, 2)


def channels_last(latents: Tensor) -> Tensor:
    """Kandinsky 5: (B, C, F, h, w) to (B, F, h, w, C)."""
    return latents.movedim(1, -1)


def normalise(vae: Any, latents: Tensor) -> Tensor:
    """Scales the VAE's latents for the denoiser, by the VAE's shift and scale or statistics."""
    scale = getattr(vae.config, "scaling_factor", None) or 1.0
    if _setting(vae, "latents_mean") is None or _setting(vae, "latents_std") is None:
        return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * scale
    return standardise(vae, latents) * scale


def standardise(vae: Any, latents: Tensor) -> Tensor:
    """Scales the VAE's latents by the mean and standard deviation of each channel alone."""
    shape = (1, -1, *[1] * (latents.ndim - 2))
    mean, std = (
        torch.as_tensor(_setting(vae, name)).to(latents).view(shape)
        for name in ("latents_mean", "latents_std")
    )
    return (latents - mean) / std


def _setting(vae: Any, name: str) -> Any:
    """Returns a field of the VAE's configuration, or a buffer of the VAE (LTX-Video)."""
    value = getattr(vae.config, name, None)
    return getattr(vae, "_buffers", {}).get(name) if value is None else value


def patchify_and_normalise(vae: Any, latents: Tensor) -> Tensor:
    """FLUX.2: (B, C, h, w) to (B, 4 C, h/2, w/2), scaled by the statistics of a batch norm."""
    return normalise_patches(vae, patchify(latents, pixels_first=False))


def pixels_first_and_normalise(vae: Any, latents: Tensor) -> Tensor:
    """Ideogram 4: as FLUX.2, but the channels are 4 pixels of C rather than C of 4 pixels."""
    return normalise_patches(vae, patchify(latents, pixels_first=True))


def patchify(latents: Tensor, pixels_first: bool) -> Tensor:
    """Puts patches of 2 x 2 into channels: (B, C, h, w) to (B, 4 C, h/2, w/2)."""
    items, channels, height, width = latents.shape
    patches = latents.view(items, channels, height // 2, 2, width // 2, 2)
    order = (0, 3, 5, 1, 2, 4) if pixels_first else (0, 1, 3, 5, 2, 4)
    return patches.permute(order).reshape(items, 4 * channels, height // 2, width // 2)


def normalise_patches(vae: Any, patches: Tensor) -> Tensor:
    """Scales patches in channels by the statistics of the VAE's batch norm."""
    mean, variance = (
        value.to(patches).view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var)
    )
    return (patches - mean) / (variance + getattr(vae.config, "batch_norm_eps", vae.bn.eps)).sqrt()


@dataclass(frozen=True)
class ReferenceEncoder:
    """Encodes pictures as the latents of a family, for references from outside of the batch.

    Attributes:
        takes: input of the VAE: an `"image"` (1, 3, H, W), a `"video"` (1, 3, F, H, W), or the
            `"frames"` of a video as images (F, 3, H, W).
        normalise: (vae, its latents) -> latents on the denoiser's scale.
        pack: puts latents into the order of the model's argument, (1, tokens, channels) or
            (1, ...).
        packing: number of latents per packed token, in height and in width.
        frame_axis: axis of the frames in latents that are not packed.
        grid_axes: axes of height and width in latents that are not packed.
    """

    takes: Literal["image", "video", "frames"] = "image"
    normalise: Callable[[Any, Tensor], Tensor] = normalise
    pack: Callable[[Tensor], Tensor] = as_they_are
    packing: int = 1
    frame_axis: int = 2
    grid_axes: tuple[int, int] = (-2, -1)

    def size(
        self, pipe: Any, latents: Tensor, grid: Grid | None, frames: int
    ) -> tuple[int, int, int]:
        """Returns (frames, height, width) in pixels of a run with these latents.

        Args:
            pipe: the pipeline, which knows the number of pixels per latent.
            latents: latents of the run, items first.
            grid, frames: grid and frames of the image tokens, used if the latents are packed.

        Raises:
            ValueError: the size is not known.
        """
        packing = self.packing
        if latents.ndim != 3:
            packing, grid = 1, (latents.shape[self.grid_axes[0]], latents.shape[self.grid_axes[1]])
            frames = latents.shape[self.frame_axis] if latents.ndim == 5 else 1
        if grid is None:
            raise ValueError("the size of this run is not known; give the reference as latents")
        spatial = _factor(pipe, SPATIAL) * packing
        frames = (frames - 1) * _factor(pipe, TEMPORAL, 1) + 1
        return frames, grid[0] * spatial, grid[1] * spatial

    @torch.no_grad()
    def __call__(self, pipe: Any, pixels: Tensor) -> Tensor:
        """Encodes pixels (F, 3, H, W) in [-1, 1] as latents (1, ...) in fp32.

        It draws no random numbers: it takes the mode of the VAE's distribution.
        """
        vae = pipe.vae
        weights = next(vae.parameters())
        dtype = weights.dtype
        # SDXL's VAE overflows in fp16; pipelines decode with it in fp32 as well.
        upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
        device = getattr(pipe, "_execution_device", weights.device)
        if self.takes == "video":
            pixels = pixels.transpose(0, 1)[None]
        try:
            if upcast:
                vae.to(torch.float32)
            encoded = vae.encode(pixels.to(device, torch.float32 if upcast else dtype))
        finally:
            if upcast:
                vae.to(dtype)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        if self.takes == "frames":
            latents = latents.transpose(0, 1)[None]
        return self.pack(self.normalise(vae, latents.float()))


def _factor(pipe: Any, names: tuple[str, ...], default: int | None = None) -> int:
    found = next((getattr(pipe, name) for name in names if hasattr(pipe, name)), default)
    if found is None:
        raise ValueError(
            f"{type(pipe).__name__} does not say how many pixels a latent has; give the reference "
            "as latents"
        )
    return int(found)


IMAGE = ReferenceEncoder()
"""Latents (B, C, h, w) of a VAE for images."""

PACKED = ReferenceEncoder(pack=pack_2x2, packing=2)
"""FLUX.1: latents of a VAE for images, packed into tokens of 2 x 2 latents."""

PACKED_FRAME = ReferenceEncoder(takes="video", pack=pack_2x2, packing=2)
"""Qwen-Image: latents of a VAE for videos, packed as FLUX.1's."""

VIDEO = ReferenceEncoder(takes="video")
"""Latents (B, C, F, h, w) of a VAE for videos."""

FRAMES = ReferenceEncoder(takes="frames")
"""Latents (B, C, F, h, w) of a VAE for images."""

FRAMES_FIRST = ReferenceEncoder(takes="video", pack=frames_first, frame_axis=1)
"""CogVideoX: latents (B, F, C, h, w)."""

PACKED_VIDEO = ReferenceEncoder(takes="video", pack=pack_pixels)
"""LTX-Video: one token per latent."""
