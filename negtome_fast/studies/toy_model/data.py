"""The training data: rendered avatars and their latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...models import avatars as world


def training_avatars(count: int, seed: int, kind: world.Kind = "skewed") -> list[world.Avatar]:
    """Return avatars of one kind, then the protected characters."""
    return world.sample_avatars(count, seed, kind) + [a for a, _ in world.CHARACTERS.values()]


def load_images(path: Path, avatars: list[world.Avatar], processes: int) -> torch.Tensor:
    """Return rendered images, `(count, 3, 64, 64)` uint8, cached in `path`."""
    if path.exists():
        images = np.load(path)
        if len(images) == len(avatars):
            return torch.from_numpy(images)
    images = np.ascontiguousarray(world.render_all(avatars, processes).transpose(0, 3, 1, 2))
    np.save(path, images)
    return torch.from_numpy(images)


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images as fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


@torch.no_grad()
def encode(vae: Any, images: torch.Tensor, path: Path) -> torch.Tensor:
    """Return latent means, `(count, 8, 16, 16)` fp32, cached in `path`."""
    if path.exists():
        return torch.load(path, weights_only=True)
    latents = torch.cat(
        [vae.encode(to_model_range(chunk)).latent_dist.mode() for chunk in images.split(256)]
    )
    torch.save(latents, path)
    return latents


def scale_latents(vae: Any, latents: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
    """Return all latents, scaled to zero mean and unit variance over `latents`.

    Shift and scale are written to the VAE's config.
    """
    shift, scale = float(latents.mean()), float(1 / latents.std())
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    return (torch.cat([latents, *more]) - shift) * scale
