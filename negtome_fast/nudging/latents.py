"""Images of a bank as points in the latents of a running pipeline, at the noise of a step.

A point is the mean, over the noise, of the image's noised latents: (1 - s) x0 for flow matching,
sqrt(a) x0 for DDPM, x0 for Euler. The inner products of the objective are linear in the points, so
the mean point gives the mean product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..pipelines.api import denoisers_of
from ..pipelines.layouts import Layout, layout_of
from .images import resized


def layout_of_pipeline(pipe: Any) -> Layout:
    """Return the layout of the pipeline's denoiser, or of the first one of several."""
    return layout_of(next(iter(denoisers_of(pipe)[0])))


class LatentPoints:
    """Points that steer each of the images that are being generated.

    Args:
        pipe: a pipeline with a VAE.
        layout: layout of its denoiser, which says how pictures become latents.
        pixels: points of each image, `(k, 3, S, S)` in [0, 1], the same k for all.
        size: (height, width) of the images.

    Raises:
        ValueError: the pipeline cannot encode pictures.
    """

    def __init__(
        self, pipe: Any, layout: Layout, pixels: Sequence[Tensor], size: tuple[int, int]
    ) -> None:
        if layout.encode is None or getattr(pipe, "vae", None) is None:
            raise ValueError(
                f"it is not known how {type(pipe).__name__} encodes pictures, so its latents "
                "cannot be nudged; use method='negtome' or 'reseed'"
            )
        encode = layout.encode
        known: dict[bytes, Tensor] = {}  # images often share their nearest points

        def encoded(picture: Tensor) -> Tensor:
            key = picture.numpy().tobytes()
            if key not in known:
                known[key] = encode(pipe, resized(picture[None], size) * 2 - 1)[0]
            return known[key]

        self._clean = torch.stack(
            [torch.stack([encoded(picture) for picture in own]) for own in pixels]
        )

    @torch.no_grad()
    def at_step(self, scheduler: Any, latents: Tensor, step: int) -> Tensor:
        """Return points `(B, k, ...)` for latents `(B, ...)` that are about to enter step `step`.

        Raises:
            ValueError: these latents differ in shape from the encoded pictures, or the scheduler
                does not tell how it adds noise.
        """
        if self._clean.shape[2:] != latents.shape[1:] or len(self._clean) != len(latents):
            raise ValueError(
                f"the latents of this pipeline, {tuple(latents.shape)}, are not of the form "
                f"{(len(latents), *self._clean.shape[2:])} that pictures are encoded to, so they "
                "cannot be nudged; use method='negtome' or 'reseed'"
            )
        points = self._clean.to(latents.device)
        if step < len(scheduler.timesteps):
            add = getattr(scheduler, "scale_noise", None)
            timestep = scheduler.timesteps[step : step + 1]
            flat = points.flatten(0, 1)
            noise = torch.zeros_like(flat)
            if add is not None:
                flat = add(flat, timestep, noise)
            elif hasattr(scheduler, "add_noise"):
                flat = scheduler.add_noise(flat, noise, timestep)
            else:
                raise ValueError(
                    f"{type(scheduler).__name__} does not tell how it adds noise, so latents "
                    "cannot be nudged; use method='negtome' or 'reseed'"
                )
            points = flat.view_as(points)
        return points.to(latents.dtype)
