"""The rectified-flow training task: `|v(x_t, t) - (noise - x_0)|^2`, `x_t = (1 - t) x_0 + t noise`.

`x_0` are the latents of an avatar, and `v` is the transformer's output.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...models import TEXT_LENGTH
from ...models import avatars as world
from .parts import LATENT_CHANNELS, build_text_encoders, build_tokenizers, build_transformer


class FlowTask:
    """Batches, text encoding and the rectified-flow loss of the transformer's training.

    Args:
        latents: `(count, 8, 16, 16)`, of `avatars`, then of `unusual`.
        avatars: skewed avatars, ending with the protected characters.
        unusual: avatars whose captions name every attribute outside the majority. The model learns
            the words from them, and attributes that a prompt leaves open stay skewed.
        batch: number of images per step.
    """

    def __init__(
        self,
        latents: torch.Tensor,
        avatars: list[world.Avatar],
        unusual: list[world.Avatar],
        batch: int,
    ) -> None:
        from diffusers import FluxPipeline

        height, width = latents.shape[-2:]
        self.tokens = FluxPipeline._pack_latents(
            latents, len(latents), LATENT_CHANNELS, height, width
        )
        self.image_ids = FluxPipeline._prepare_latent_image_ids(
            1, height // 2, width // 2, torch.device("cpu"), torch.float32
        )
        self.text_ids = torch.zeros(TEXT_LENGTH, 3)
        self.skewed = len(avatars)
        self.avatars = avatars + unusual
        self.batch = batch
        self.tokenizers = build_tokenizers()
        self.modules = dict(
            zip(("clip", "t5"), build_text_encoders(len(self.tokenizers[0])), strict=True)
        )
        self.modules["transformer"] = build_transformer()

    def choose(self, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
        """Draw indices and prompts: 30% unusual, 6% protected, 10% with an empty prompt."""
        protected = len(world.CHARACTERS)
        indices = rng.integers(self.skewed - protected, size=self.batch)
        kind = rng.random(self.batch)
        is_character, is_unusual = kind < 0.06, kind > 0.7
        indices[is_character] = self.skewed - 1 - rng.integers(protected, size=is_character.sum())
        unusual = len(self.avatars) - self.skewed - protected
        indices[is_unusual] = self.skewed + rng.integers(unusual, size=is_unusual.sum())
        return indices, [self.caption(index, rng) for index in indices]

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """Draw a true prompt for an avatar; one in ten is empty."""
        avatar = self.avatars[index]
        if rng.random() < 0.1:
            return ""
        if index >= self.skewed:
            return world.unusual_prompt(avatar, rng)
        return world.random_prompt(avatar, rng)

    def embed(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pooled CLIP `(B, 64)` and T5 tokens `(B, 16, 64)`, padded as in the pipeline."""
        options = {
            "padding": "max_length",
            "max_length": TEXT_LENGTH,
            "truncation": True,
            "return_tensors": "pt",
        }
        clip_ids, t5_ids = (t(prompts, **options).input_ids for t in self.tokenizers)
        return self.modules["clip"](clip_ids).pooler_output, self.modules["t5"](t5_ids)[0]

    def loss(self, step: int) -> torch.Tensor:
        """Return the loss of one step, from 0."""
        indices, prompts = self.choose(np.random.default_rng(step))
        clean = self.tokens[torch.from_numpy(indices)]
        noise = torch.randn_like(clean)
        time_ = torch.sigmoid(1.2 * torch.randn(len(clean)))
        mixed = torch.lerp(clean, noise, time_[:, None, None])
        pooled, text = self.embed(prompts)
        velocity = self.modules["transformer"](
            hidden_states=mixed,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=time_,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]
        return F.mse_loss(velocity, noise - clean)

    def pipeline(self, vae: Any) -> Any:
        """Return a pipeline of the modules as they are."""
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=self.modules["clip"],
            tokenizer=self.tokenizers[0],
            text_encoder_2=self.modules["t5"],
            tokenizer_2=self.tokenizers[1],
            transformer=self.modules["transformer"],
        )
