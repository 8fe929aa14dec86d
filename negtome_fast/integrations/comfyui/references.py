"""Reference images: encoded once per size of a run, noised to the sigma of each step."""

from __future__ import annotations

from typing import Any

import torch

from negtome_fast.config import ReferenceSettings
from negtome_fast.pipelines.references import draw_noise


class ReferenceImages:
    """Images that guide a model, and the VAE that encodes them.

    Args:
        images: (R, H, W, 3) in [0, 1], ComfyUI's IMAGE; each is one reference.
        vae: ComfyUI's VAE of the model.
        mask: ComfyUI's MASK, (R, H, W), or (1, H, W) for all, from 0 to 1; a reference may be
            matched where it is above 0.5. It is stretched to the image.

    Raises:
        ValueError: the sizes do not fit, or the mask is empty.
    """

    def __init__(self, images: torch.Tensor, vae: Any, mask: torch.Tensor | None = None) -> None:
        if images.ndim != 4 or images.shape[-1] < 3:
            raise ValueError(f"the images must be (R, H, W, 3), not {tuple(images.shape)}")
        self._images = images[..., :3]
        self._vae = vae
        self.settings = tuple(ReferenceSettings(mask=one) for one in self._masks(mask))
        self._size: tuple[int, ...] | None = None
        self._encoded: list[torch.Tensor] = []
        self._clean: list[torch.Tensor] = []
        self._noise: list[torch.Tensor] = []

    def _masks(self, mask: torch.Tensor | None) -> list[torch.Tensor | None]:
        count = len(self._images)
        if mask is None:
            return [None] * count
        masks = mask[None] if mask.ndim == 2 else mask
        if masks.ndim != 3 or len(masks) not in (1, count):
            raise ValueError(
                f"the mask is {tuple(mask.shape)}; {count} images need (1, H, W) or ({count}, H, W)"
            )
        allowed = masks > 0.5
        if not allowed.flatten(1).any(dim=1).all():
            raise ValueError(
                "the mask is empty, so nothing of the image could be matched: draw the region to "
                "avoid in the mask editor, or disconnect the mask to use the whole image"
            )
        return list(allowed.expand(count, -1, -1))

    def begin_run(self, model: Any, latents: torch.Tensor, seed: int) -> None:
        """Encodes the images at the size of a run, and draws their noise from its seed.

        Args:
            model: ComfyUI's `BaseModel`.
            latents: latents of the run, (B, C, H, W) or (B, C, F, H, W).
            seed: seed of the run.
        """
        size = tuple(latents.shape[1:])
        if size != self._size:
            self._encoded = [self._encode(image[None], size) for image in self._images]
            self._size = size
        self._clean = [model.process_latent_in(encoded).float() for encoded in self._encoded]
        self._noise = draw_noise(self._clean, torch.Generator().manual_seed(seed))

    def _encode(self, image: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        factor = self._vae.spacial_compression_encode()
        height, width = (length * factor for length in size[-2:])
        pixels = torch.nn.functional.interpolate(
            image.movedim(-1, 1).float(), (height, width), mode="bicubic", antialias=True
        )
        encoded = self._vae.encode(pixels.clamp(0, 1).movedim(1, -1))
        if len(size) == 4 and encoded.ndim == 4:  # the run has frames, the VAE makes images
            encoded = encoded.unsqueeze(2)
        if tuple(encoded.shape[1:]) != size:
            raise ValueError(
                f"the reference image has latents {tuple(encoded.shape[1:])}, and this run "
                f"{size}; connect the VAE of this model. Videos cannot be guided by an image"
            )
        return encoded

    def at(self, sigma: torch.Tensor, like: torch.Tensor, model: Any, which: slice) -> torch.Tensor:
        """Returns the model's input for some references at a sigma (1,): (R, C, ...).

        Args:
            sigma: noise level of the step.
            like: input of the run's own forward, whose shape, dtype and device these take.
            model: ComfyUI's `BaseModel`.
            which: the references.
        """
        clean, noise = (torch.cat(kept[which]).to(like) for kept in (self._clean, self._noise))
        if clean.shape[1:] != like.shape[1:]:
            raise ValueError(
                f"a forward of {tuple(like.shape[1:])} in a run of {tuple(clean.shape[1:])}: "
                "reference images cannot be used with prompts for areas or with context windows"
            )
        noised: torch.Tensor = model.model_sampling.noise_scaling(sigma, noise, clean)
        return noised
