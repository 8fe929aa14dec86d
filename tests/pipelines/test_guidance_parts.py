"""Guidance parts of a batch: any number, contiguous or interleaved, and what contradicts the call.

The right value is what the same loop gives with one forward for each part, which knows no parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from diffusers import (
    DDIMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLPAGPipeline,
)

from helpers.families import FAMILIES
from helpers.families.core import embeddings, noise
from helpers.pipelines_fixtures import sd_pipeline, sdxl_pipeline
from negtome_fast import Reference
from negtome_fast.config import NegToMeConfig
from negtome_fast.guidance import Guidance
from negtome_fast.pipelines import negtome_guidance

EVERY_TOKEN = NegToMeConfig(threshold=-1, t_end=0)
CALL = {"height": 64, "width": 96, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """In fp64 a batch of another size rounds too little to decide between two equal tokens."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def opened(patch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Yield a list of (parts, groups in each part) of each forward."""
    found: list[tuple[int, int]] = []
    original = Guidance.begin_step

    def begin(self: Guidance, *args: Any, parts: int = 1, groups: int = 1, **more: Any) -> bool:
        found.append((parts, groups))
        return original(self, *args, parts=parts, groups=groups, **more)

    with patch.context() as context:
        context.setattr(Guidance, "begin_step", begin)
        yield found


class Loop:
    """A pipeline with any number of guidance parts, as SEGA, LEDITS++ and OmniGen have them.

    Attributes:
        do_classifier_free_guidance: what it says, which need not be true.
    """

    def __init__(self) -> None:
        self.unet = FAMILIES["sd15"].denoiser.build()
        self.scheduler = DDIMScheduler(clip_sample=False)
        self.do_classifier_free_guidance: Any = None

    @torch.no_grad()
    def __call__(
        self, latents: Tensor, prompt_embeds: Tensor, parts: int, arrangement: str = "contiguous"
    ) -> Tensor:
        """Return the latents; `prompt_embeds` are (parts * images, tokens, channels)."""
        by_part = prompt_embeds.unflatten(0, (parts, -1))
        self.scheduler.set_timesteps(2)
        for t in self.scheduler.timesteps:
            if arrangement == "one by one":
                made = [self.unet(latents, t, embeds)[0] for embeds in by_part]
            elif arrangement == "interleaved":
                together = latents.repeat_interleave(parts, dim=0)
                out = self.unet(together, t, by_part.transpose(0, 1).flatten(0, 1))[0]
                made = [out[part::parts] for part in range(parts)]
            else:
                together = torch.cat([latents] * parts)
                made = list(self.unet(together, t, prompt_embeds)[0].chunk(parts))
            prediction = torch.stack([out * (part + 1) for part, out in enumerate(made)]).mean(0)
            latents = self.scheduler.step(prediction, t, latents, return_dict=False)[0]
        return latents


def given(parts: int, prompts: int = 1, each: int = 2, equal_seeds: bool = False) -> list[Tensor]:
    """Return latents, and the prompts' embeddings in each part."""
    latents = noise(prompts * each, 7, 4, 8, 12).to(torch.get_default_dtype())
    if equal_seeds:
        latents = latents[:1].repeat(prompts * each, 1, 1, 1)
    embeds = embeddings(parts, prompts, 5, 16).repeat_interleave(each, dim=1)
    return [latents, embeds.flatten(0, 1)]


@pytest.mark.parametrize("says", [None, True, False], ids=["silent", "says yes", "says no"])
@pytest.mark.parametrize("arrangement", ["contiguous", "interleaved"])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_any_number_of_parts_is_found(parts: int, arrangement: str, says: bool | None) -> None:
    loop = Loop()
    loop.do_classifier_free_guidance = says
    latents, embeds = given(parts, prompts=2)
    with negtome_guidance(loop, EVERY_TOKEN) as handle:
        guided = loop(latents, embeds, parts, arrangement)
        summary = handle.summary()
        handle.reset()
        expected = loop(latents, embeds, parts, "one by one")
    assert (summary.parts, summary.groups) == (parts, 2 * parts)
    torch.testing.assert_close(guided, expected, rtol=1e-6, atol=1e-6)
    for row, other in zip(summary.rows, handle.summary().rows, strict=True):
        assert (row.block, row.tokens, row.matched) == (other.block, other.tokens, other.matched)
        assert row.similarity == pytest.approx(other.similarity, rel=1e-4)


@pytest.mark.parametrize("arrangement", ["contiguous", "interleaved"])
def test_references_are_seen_in_the_conditioning_of_each_part(arrangement: str) -> None:
    loop = Loop()
    latents, embeds = given(3, prompts=2)
    reference = Reference(embeddings(1, 4, 8, 12, seed=9), noise=False)
    with negtome_guidance(loop, EVERY_TOKEN, reference=reference):
        guided = loop(latents, embeds, 3, arrangement)
        expected = loop(latents, embeds, 3, "one by one")
    torch.testing.assert_close(guided, expected, rtol=1e-6, atol=1e-6)


def test_equal_seeds_are_no_parts_for_a_pipeline() -> None:
    loop = Loop()
    for parts in (1, 2):
        latents, embeds = given(parts, each=4, equal_seeds=True)
        with negtome_guidance(loop, EVERY_TOKEN) as handle:
            loop(latents, embeds, parts)
        assert (handle.summary().parts, handle.summary().groups) == (parts, parts)


class Contradictory(Loop):
    """A loop whose batch holds something else than its latents."""

    @torch.no_grad()
    def __call__(self, latents: Tensor, *_: Any, **__: Any) -> Tensor:
        self.scheduler.set_timesteps(1)
        doubled = torch.cat([latents, latents.flip(-1), latents.roll(1, 2), latents.roll(2, 2)])
        self.unet(doubled, self.scheduler.timesteps[0], embeddings(len(doubled), 5, 16))
        return latents


def test_a_batch_that_contradicts_the_call_is_refused() -> None:
    loop = Contradictory()
    latents, _ = given(1)
    message = r"makes 2 image\(s\).* batch of 8 items .* 4 guidance parts.*repeat 1.*set groups"
    with negtome_guidance(loop, EVERY_TOKEN), pytest.raises(ValueError, match=message):
        loop(latents)
    with negtome_guidance(loop, EVERY_TOKEN, groups=4) as handle:
        loop(latents)
    assert (handle.summary().parts, handle.summary().groups) == (1, 4)


class Unclear(Loop):
    """A loop of two prompts that makes two images of each, but says one."""

    @torch.no_grad()
    def __call__(self, latents: Tensor, *_: Any, **__: Any) -> Tensor:
        prompt, num_images_per_prompt = ["a", "b"], 1
        self.scheduler.set_timesteps(1)
        self.unet(latents, self.scheduler.timesteps[0], embeddings(1, 5, 16).repeat(4, 1, 1))
        return latents * len(prompt) * num_images_per_prompt


def test_prompts_that_do_not_fit_the_images_are_refused() -> None:
    loop = Unclear()
    message = r"2 prompts with 1 image\(s\) each, but the batch holds 4 images.* set groups"
    with negtome_guidance(loop, EVERY_TOKEN), pytest.raises(ValueError, match=message):
        loop(given(1, each=4)[0])
    with negtome_guidance(loop, EVERY_TOKEN, groups=2) as handle:
        loop(given(1, each=4)[0])
    assert handle.summary().groups == 2


@pytest.mark.parametrize("prompts", [1, 2])
def test_perturbed_attention_guidance_has_three_parts(prompts: int) -> None:
    pipe = StableDiffusionXLPAGPipeline(
        **sdxl_pipeline().components, add_watermarker=False, pag_applied_layers=["mid"]
    )
    pipe.set_progress_bar_config(disable=True)
    for cfg, pag, parts in ((True, True, 3), (False, True, 2), (True, False, 2), (False, False, 1)):
        with negtome_guidance(pipe, EVERY_TOKEN) as handle, torch.no_grad():
            pipe(
                prompt_embeds=embeddings(prompts, 5, 16),
                pooled_prompt_embeds=embeddings(prompts, 16),
                negative_prompt_embeds=embeddings(prompts, 5, 16, seed=4),
                negative_pooled_prompt_embeds=embeddings(prompts, 16, seed=4),
                num_images_per_prompt=2,
                guidance_scale=3.0 if cfg else 1.0,
                pag_scale=3.0 if pag else 0.0,
                **CALL,
            )
        assert (handle.summary().parts, handle.summary().groups) == (parts, parts * prompts)


def test_instruct_pix2pix_has_three_parts_whose_given_images_differ() -> None:
    components = sd_pipeline().components
    unet = (
        FAMILIES["sd15"]
        .denoiser.cls(**{**FAMILIES["sd15"].denoiser.config(), "in_channels": 8})
        .eval()
    )
    pipe = StableDiffusionInstructPix2PixPipeline(
        **{**components, "unet": unet, "vae": FAMILIES["bria"].parts["vae"].build()},
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    with negtome_guidance(pipe, EVERY_TOKEN) as handle, torch.no_grad():
        pipe(
            image=embeddings(2, 4, 8, 12),
            prompt_embeds=embeddings(2, 5, 16),
            negative_prompt_embeds=embeddings(2, 5, 16, seed=4),
            num_images_per_prompt=2,
            guidance_scale=3.0,
            image_guidance_scale=1.5,
            num_inference_steps=2,
            output_type="latent",
        )
    assert (handle.summary().parts, handle.summary().groups) == (3, 6)


def test_skip_layer_guidance_has_a_forward_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: StableDiffusion3Pipeline = FAMILIES["sd3"].build()
    with negtome_guidance(pipe, EVERY_TOKEN), opened(monkeypatch) as found, torch.no_grad():
        pipe(
            prompt_embeds=embeddings(2, 5, 16).repeat_interleave(2, dim=0),
            pooled_prompt_embeds=embeddings(2, 16).repeat_interleave(2, dim=0),
            negative_prompt_embeds=embeddings(1, 5, 16, seed=4).repeat(4, 1, 1),
            negative_pooled_prompt_embeds=embeddings(1, 16, seed=4).repeat(4, 1),
            skip_guidance_layers=[1],
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
            guidance_scale=3.0,
            **CALL,
        )
    assert found == [(2, 2), (2, 2), (1, 2)]  # not in the first step


@pytest.mark.parametrize(("parts", "each"), [(1, 4), (2, 2), (4, 1)])
def test_equal_latents_without_a_call_are_ambiguous(parts: int, each: int) -> None:
    """The most parts are taken, so that no part is ever pushed away from another."""
    unet = FAMILIES["sd15"].denoiser.build()
    latents, embeds = given(parts, each=each, equal_seeds=True)
    call = (torch.cat([latents] * parts), 900, embeds)
    with torch.no_grad():
        plain = unet(*call)[0]
        with negtome_guidance(unet, EVERY_TOKEN) as handle:
            with pytest.warns(UserWarning, match=r"repeat 4 or 2 or 1 time.*seed of its own"):
                assert torch.equal(unet(*call)[0], plain)
            assert handle.summary().parts == 4
        with negtome_guidance(unet, EVERY_TOKEN, groups=1) as handle, warnings.catch_warnings():
            warnings.simplefilter("error")
            unet(*call)
            assert handle.summary().parts == 2


@pytest.mark.parametrize("arrangement", ["contiguous", "interleaved"])
def test_a_bare_model_in_a_plain_loop_is_guided_by_its_latents(arrangement: str) -> None:
    unet: nn.Module = FAMILIES["sd15"].denoiser.build()
    latents, embeds = given(3, each=3)
    order = torch.arange(9).reshape(3, 3)
    order = (order.T if arrangement == "interleaved" else order).flatten()
    call = (torch.cat([latents] * 3)[order], 900, embeds[order])
    with negtome_guidance(unet, EVERY_TOKEN) as handle, torch.no_grad():
        guided = unet(*call)[0]
        assert (handle.summary().parts, handle.summary().groups) == (3, 3)
        alone = torch.cat([unet(latents, 900, part)[0] for part in embeds.chunk(3)])
    torch.testing.assert_close(guided, alone[order], rtol=1e-6, atol=1e-6)
