"""Denoisers of diffusers that are in no table of ours: `UNLISTED`. A plain loop calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers.families.core import TEXT, Denoiser, Family, LoopFamily, Part, Run
from helpers.families.loops import frames, packed, unpacked, wan_like
from helpers.families.videos import FRAMES, WAN

FLUX3 = Denoiser(
    "Flux3Transformer2DModel",
    in_channels=16,
    cond_in_channels=16,
    axes_dims_rope=(2, 2, 2, 2),
    timestep_channels=16,
)
BRIA_FIBO2 = Denoiser(
    "BriaFibo2Transformer2DModel",
    in_channels=4,
    dim=16,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    cap_feat_dim=16,
    injection_layer_ids=(1,),
    min_num_gist_tokens=4,
    max_num_gist_tokens=8,
    gist_step=4,
    gist_min_text_len=4,
    gist_max_text_len=8,
    axes_dims=(2, 2, 4),
    axes_lens=(32, 32, 32),
)


def class_to_image(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "timestep": timesteps,
        "class_labels": torch.ones(run.images, dtype=torch.long),
    }


def lumina_next(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return {
        "hidden_states": latents,
        "timestep": timesteps / 1000,
        "encoder_hidden_states": run.text(),
        "encoder_mask": run.mask(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 24, 24),
        "cross_attention_kwargs": {},
    }


def bria_fibo2(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "timestep": timesteps / 1000,
        "encoder_hidden_states": run.given(2, TEXT, 16),
    }


def bria_fibo2_edit(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    given = run.given(*latents.shape[1:], seed=5)
    return {**bria_fibo2(run, latents, timesteps), "context_latents": [given]}


def flux3(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    height, width = run.grid(16)
    places = torch.cartesian_prod(*map(torch.arange, (1, height, width, 1))).float()
    words = torch.cartesian_prod(*map(torch.arange, (1, 1, 1, TEXT))).float()
    return {
        "hidden_states": latents,
        "encoder_hidden_states": run.text(),
        "timestep": timesteps / 1000,
        "img_ids": places,
        "txt_ids": words,
    }


def any_flow(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    times = timesteps[:, None].repeat(1, FRAMES)
    return {**wan_like(run, latents, times), "r_timestep": times - 100}


def helios(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    """Return Helios's arguments: earlier frames at three resolutions come first."""
    past = {"long": (0, 8), "mid": (8, 10), "short": (10, 12)}
    given = {f"latents_history_{k}": run.given(*frames(run, b - a)) for k, (a, b) in past.items()}
    indices = {
        f"indices_latents_history_{k}": torch.arange(*place).repeat(run.images, 1)
        for k, place in past.items()
    }
    own = torch.arange(12, 12 + FRAMES).repeat(run.images, 1)
    return {
        **wan_like(run, latents, timesteps),
        **given,
        **indices,
        "indices_hidden_states": own,
    }


def motif(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    """Return Motif's arguments: the given image and its mask are in further channels."""
    given = run.given(5, *latents.shape[2:], seed=5)
    return {
        "hidden_states": torch.cat([latents, given], dim=1),
        "timestep": timesteps,
        "encoder_hidden_states": run.text(),
        "encoder_attention_mask": run.mask(),
    }


def no_text(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    return {"sample": latents, "timestep": timesteps[:1]}


# Each entry is filled like a paragraph, so that the whole table can be seen at once.
# fmt: off
UNLISTED: dict[str, Family] = {
    "dit": LoopFamily(
        Denoiser(
            "DiTTransformer2DModel", out_channels=4, num_embeds_ada_norm=10, norm_num_groups=2),
        unpacked, class_to_image, grids={(64, 64): {(4, 4)}}),
    "lumina next": LoopFamily(
        Denoiser(
            "LuminaNextDiT2DModel", learn_sigma=False, multiple_of=2, cross_attention_dim=16,
            hidden_size=16, num_kv_heads=1), unpacked, lumina_next),
    "bria fibo 2": LoopFamily(BRIA_FIBO2, unpacked, bria_fibo2),
    "bria fibo 2 edit": LoopFamily(BRIA_FIBO2, unpacked, bria_fibo2_edit),
    "flux 3": LoopFamily(FLUX3, packed, flux3),
    "any flow": LoopFamily(
        Denoiser("AnyFlowTransformer3DModel", **WAN),
        lambda run: (FRAMES, 4, *run.grid(8)), any_flow),
    "helios": LoopFamily(
        Denoiser("HeliosTransformer3DModel", **WAN, rope_dim=(4, 6, 6)), frames, helios),
    "motif": LoopFamily(
        Denoiser(
            "MotifVideoTransformer3DModel", attention_head_dim=16, in_channels=9,
            rope_axes_dim=(4, 6, 6)), frames, motif),
    "unet without text": LoopFamily(
        Denoiser(
            "UNet2DModel", block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4),
        unpacked, no_text, scheduler=Part("DDIMScheduler"), grids={(64, 96): {(4, 6)}}),
}
# fmt: on
