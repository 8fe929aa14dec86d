"""Pictures become the latents that diffusers' own pipelines make of them, by real small VAEs.

The oracle is each family's image-to-image (or editing) pipeline: its encoding and its packing.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

import diffusers
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from helpers.families.core import seeded
from negtome_fast.pipelines import known_layouts

HEIGHT, WIDTH = 32, 48
KL: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 0.36,
    "shift_factor": 0.11,
}
VIDEO: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, -0.4],
    "latents_std": [1.5, 0.5, 2.0, 0.8],
}


@pytest.fixture(autouse=True)
def no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the pipelines draw from the posterior, of which a reference takes the mode."""
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )


def pixels(frames: int = 1) -> Tensor:
    """(F, 3, H, W) in [-1, 1]."""
    random = torch.Generator().manual_seed(0)
    return torch.rand(frames, 3, HEIGHT, WIDTH, generator=random) * 2 - 1


def flux(pipeline: Any, vae: Any) -> Tensor:
    image = pipeline._encode_vae_image(SimpleNamespace(vae=vae), pixels(), None)
    return pipeline._pack_latents(image, *image.shape)


def flux_2(pipeline: Any, vae: Any) -> Tensor:
    with torch.no_grad():
        vae.bn.running_mean.normal_(generator=torch.Generator().manual_seed(1))
        vae.bn.running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(2))
    own = SimpleNamespace(vae=vae, _patchify_latents=pipeline._patchify_latents)
    return pipeline._pack_latents(pipeline._encode_vae_image(own, pixels(), None))


def qwen_image(pipeline: Any, vae: Any) -> Tensor:
    image = pipeline._encode_vae_image(SimpleNamespace(vae=vae), pixels()[:, :, None], None)
    return pipeline._pack_latents(image, 1, image.shape[1], *image.shape[-2:])


def sdxl(pipeline: Any, vae: Any) -> Tensor:
    own = SimpleNamespace(vae=vae, vae_scale_factor=2)
    return pipeline.prepare_latents(
        own, pixels(), None, 1, 1, torch.float32, torch.device("cpu"), None, add_noise=False
    )


def ltx(pipeline: Any, vae: Any) -> Tensor:
    with torch.no_grad():
        vae.latents_mean.normal_(generator=torch.Generator().manual_seed(1))
        vae.latents_std.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(2))
    video = vae.encode(pixels(frames=9).transpose(0, 1)[None]).latent_dist.mode()
    video = pipeline._normalize_latents(
        video, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    )
    return pipeline._pack_latents(video, 1, 1)


LTX: dict[str, Any] = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False),
    "scaling_factor": 0.7,
}
#: Denoiser -> the VAE, its settings, the pipeline, what the pipeline makes, frames.
CASES: dict[str, tuple[str, dict[str, Any], str, Callable[[Any, Any], Tensor], int]] = {
    "FluxTransformer2DModel": ("AutoencoderKL", KL, "FluxImg2ImgPipeline", flux, 1),
    "Flux2Transformer2DModel": (
        "AutoencoderKLFlux2",
        {k: v for k, v in KL.items() if k not in ("scaling_factor", "shift_factor")},
        "Flux2Pipeline",
        flux_2,
        1,
    ),
    "QwenImageTransformer2DModel": (
        "AutoencoderKLQwenImage",
        VIDEO,
        "QwenImageImg2ImgPipeline",
        qwen_image,
        1,
    ),
    "UNet2DConditionModel": (
        "AutoencoderKL",
        {**KL, "shift_factor": None},
        "StableDiffusionXLImg2ImgPipeline",
        sdxl,
        1,
    ),
    "LTXVideoTransformer3DModel": (
        "AutoencoderKLLTXVideo",
        LTX,
        "LTXImageToVideoPipeline",
        ltx,
        9,
    ),
}


@pytest.mark.parametrize("denoiser", CASES)
@torch.no_grad()
def test_a_picture_becomes_the_latents_of_the_pipeline(denoiser: str) -> None:
    autoencoder, settings, pipeline, encode, frames = CASES[denoiser]
    vae = seeded(getattr(diffusers, autoencoder), **settings)
    expected = encode(getattr(diffusers, pipeline), vae)
    encoder = known_layouts()[denoiser].encode
    assert encoder is not None
    latents = encoder(SimpleNamespace(vae=vae), pixels(frames))
    assert latents.dtype == torch.float32 and latents.std() > 1e-3
    torch.testing.assert_close(latents, expected)
