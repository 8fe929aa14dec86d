"""The authors' reference picture: in every step the first item of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
from diffusers import DDIMScheduler
from PIL import Image

from helpers.compat_emulation import (
    ARGS,
    Emulation,
    Recorded,
    agree,
    flux,
    recorded,
    sdxl,
    small_vae,
)
from helpers.pipelines_fixtures import TEXT, generate


def picture(height: int, width: int) -> tuple[Image.Image, Image.Image]:
    rows = torch.linspace(0, 255, height).byte()[:, None].expand(height, width)
    columns = torch.linspace(0, 255, width).byte().expand(height, width)
    image = torch.stack([rows, columns, rows.flip(0)], -1).numpy()
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[: height // 2, : width // 3] = 255
    return Image.fromarray(image), Image.fromarray(mask.numpy()).convert("RGB")


@pytest.mark.parametrize("noise", [False, True], ids=["clean", "noised"])
@pytest.mark.parametrize("scheduler", ["flow", "euler", "ddim"])
def test_reference_picture_is_the_first_item_of_every_step(
    double: None, scheduler: str, noise: bool
) -> None:
    """Against a loop that is written out here: encode, sample, noise, put in place, step."""
    is_flux = scheduler == "flow"
    pipe = flux() if is_flux else sdxl()
    if scheduler == "ddim":
        pipe.register_modules(scheduler=DDIMScheduler(clip_sample=False, steps_offset=1))
    pipe.register_modules(vae=small_vae(4))
    pipe.vae_scale_factor = 8
    height, width = 64, 64
    image, mask = picture(height, width)
    arguments = {**ARGS, "use_rag_assets": True, "rag_assets": [(image, mask)], "noise_rag": noise}
    if not is_flux:
        arguments["min_attn_dim"] = 8

    def call(**more: Any) -> Tensor:
        random = torch.Generator().manual_seed(3)
        text = torch.randn(1, TEXT, 16, generator=random)
        given = {
            "prompt_embeds": text,
            "pooled_prompt_embeds": text[:, 0],
            "num_images_per_prompt": 3,
            "height": height,
            "width": width,
            "num_inference_steps": 3,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(5),
            **more,
        }
        if not is_flux:
            given.update(
                negative_prompt_embeds=-text,
                negative_pooled_prompt_embeds=-text[:, 0],
                guidance_scale=3.0,
            )
        with torch.no_grad():
            return pipe(**given).images

    model = pipe.transformer if is_flux else pipe.unet
    with recorded(model) as ours:
        result = call(use_negtome=True, negtome_args=arguments)
    assert "step" not in vars(pipe.scheduler)
    hooks = (model._forward_pre_hooks, model._forward_hooks)
    assert not any(hooks)

    expected, recordings = their_loop(pipe, model, image, mask, noise, call)
    agree(ours, recordings)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    # The picture is in the batch without guidance too, and the masked run differs from it.
    unguided = call(use_negtome=False, negtome_args=arguments)
    torch.testing.assert_close(unguided[0], result[0], rtol=0, atol=1e-4)
    assert not torch.allclose(unguided[1], result[1], atol=1e-4)


class TheirLoop:
    """The authors' changes to the loop: the picture is the first item of `latents` in every step.

    FLUX: written into the tensor that the loop gives to the model. SDXL: written before the loop
    and at the end of each step, because the scheduler makes another tensor for the model.
    """

    def __init__(self, pipe: Any, image: Image.Image, noise: bool) -> None:
        self.pipe, self.noise = pipe, noise
        self.is_flux = hasattr(pipe, "transformer")
        self.pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
        self.pixels = (2 * self.pixels.permute(2, 0, 1)[None] - 1).double()
        self.prepare_latents = pipe.prepare_latents
        self.generator = torch.Generator()

    def picture_latents(self, timestep: Tensor) -> Tensor:
        latents = self.pipe.vae.encode(self.pixels).latent_dist.sample(self.generator)
        latents = (latents - 0.1) * 0.4 if self.is_flux else latents * 0.4
        if self.noise:
            drawn = torch.randn(latents.shape, generator=self.generator)
            if self.is_flux:
                latents = self.pipe.scheduler.scale_noise(latents, timestep.view(1), drawn)
            else:
                latents = self.pipe.scheduler.add_noise(latents, drawn, timestep.view(1))
        if self.is_flux:
            b, c, h, w = latents.shape
            latents = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
            latents = latents.reshape(b, h * w // 4, c * 4)
        return latents

    def prepare(self, *args: Any) -> Any:
        """Stands for `prepare_latents`."""
        made = self.prepare_latents(*args)
        self.generator = args[6]
        if not self.is_flux:
            made[:1] = self.picture_latents(self.pipe.scheduler.timesteps[0])
        return made

    def before_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.is_flux:
            timestep = torch.as_tensor(self.pipe._current_timestep)
            kwargs["hidden_states"][:1] = self.picture_latents(timestep)

    def after_step(self, pipe: Any, i: int, t: Tensor, kept: dict[str, Any]) -> dict[str, Any]:
        timesteps = pipe.scheduler.timesteps
        if not self.is_flux and i + 1 < len(timesteps):
            kept["latents"] = torch.cat(
                [self.picture_latents(timesteps[i + 1]), kept["latents"][1:]]
            )
        return kept


def their_loop(
    pipe: Any, model: nn.Module, image: Image.Image, mask: Image.Image, noise: bool, call: Any
) -> tuple[Tensor, Recorded]:
    loop = TheirLoop(pipe, image, noise)
    whole = torch.from_numpy(np.array(mask.convert("L"))).double() / 255
    size = (4, 4) if loop.is_flux else (8, 8)
    gate = F.interpolate(whole[None, None], size, mode="nearest-exact")[0, 0]
    pipe.prepare_latents = loop.prepare
    hook = model.register_forward_pre_hook(loop.before_model, with_kwargs=True)
    with recorded(model) as recordings, Emulation(model, mask=gate, min_attn_dim=8):
        result = call(callback_on_step_end=loop.after_step)
    del pipe.prepare_latents
    hook.remove()
    return result, recordings


def test_an_error_leaves_the_pipeline_as_it_was() -> None:
    pipe = flux()
    before = generate(pipe)

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    pipe.register_modules(vae=small_vae(4))
    pipe.vae_scale_factor = 8
    arguments = {**ARGS, "use_rag_assets": True, "rag_assets": [(picture(64, 96)[0], None)]}
    with pytest.raises(RuntimeError, match="stop"):
        generate(pipe, use_negtome=True, negtome_args=arguments, callback_on_step_end=fail)
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(generate(pipe), before)
