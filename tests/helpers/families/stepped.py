"""Families whose windows are in steps, as their schedulers have no timesteps from 1000 to 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers.families.core import TWO_RESOLUTIONS, Denoiser, LoopFamily, Part, Run
from helpers.families.videos import FRAMES


def stable_video_arguments(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    """Return Stable Video Diffusion's arguments: the image is in further channels.

    They are 0 in the unconditional half.
    """
    image = run.given(FRAMES, 4, *run.grid(8))
    image = torch.cat([torch.zeros_like(image), image]) if run.cfg else image
    return {
        "sample": torch.cat([latents, image], dim=2),
        "timestep": timesteps,
        "encoder_hidden_states": run.repeated(run.text(tokens=1)),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(run.batch, 1),
    }


STABLE_VIDEO = LoopFamily(
    Denoiser(
        "UNetSpatioTemporalConditionModel",
        in_channels=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 2,
        up_block_types=("CrossAttnUpBlockSpatioTemporal",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=FRAMES,
    ),
    lambda run: (FRAMES, 4, *run.grid(8)),
    stable_video_arguments,
    scheduler=Part(
        "EulerDiscreteScheduler",
        timestep_type="continuous",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
    ),
    grids=TWO_RESOLUTIONS,
    frames=FRAMES,
)


def cosmos_arguments(run: Run, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
    """Return Cosmos's arguments: the first frame is given."""
    latents = torch.cat([run.given(4, 1, *run.grid(8)), latents[:, :, 1:]], dim=2)
    mask = torch.zeros(run.images, 1, FRAMES, *run.grid(8))
    mask[:, :, 0] = 1
    return {
        "hidden_states": latents,
        "timestep": timesteps,
        "encoder_hidden_states": run.text(),
        "condition_mask": mask,
    }


COSMOS = LoopFamily(
    Denoiser(
        "CosmosTransformer3DModel",
        attention_head_dim=16,
        in_channels=5,
        mlp_ratio=2.0,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        concat_padding_mask=False,  # it would need torchvision
        extra_pos_embed_type=None,
    ),
    lambda run: (4, FRAMES, *run.grid(8)),
    cosmos_arguments,
    scheduler=Part("EDMEulerScheduler"),
    frames=FRAMES - 1,
    cfg=False,
)
