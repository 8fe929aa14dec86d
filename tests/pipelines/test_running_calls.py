"""The running call is found whichever pipeline runs the model: copies, modular pipelines, loops."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline

from helpers.families import FAMILIES
from helpers.families.core import embeddings
from helpers.pipelines_fixtures import sdxl_pipeline
from negtome_fast import Reference
from negtome_fast.config import NegToMeConfig
from negtome_fast.pipelines import negtome_guidance

EVERY_TOKEN = NegToMeConfig(threshold=-1, t_end=0)


def modular() -> Any:
    """Return FLUX's modular pipeline from the encoded prompt to the latents."""
    from diffusers.modular_pipelines import SequentialPipelineBlocks
    from diffusers.modular_pipelines.flux import before_denoise, denoise, inputs
    from diffusers.modular_pipelines.flux.modular_pipeline import FluxModularPipeline

    steps = {
        "text": inputs.FluxTextInputStep(),
        "latents": before_denoise.FluxPrepareLatentsStep(),
        "times": before_denoise.FluxSetTimestepsStep(),
        "rope": before_denoise.FluxRoPEInputsStep(),
        "denoise": denoise.FluxDenoiseStep(),
    }
    pipe = FluxModularPipeline(blocks=SequentialPipelineBlocks.from_blocks_dict(steps))
    transformer = FAMILIES["flux"].denoiser.build()
    pipe.update_components(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def copied() -> tuple[Any, Any]:
    """Return a pipeline, and a copy that shares its model and has a scheduler of its own."""
    pipe = FAMILIES["flux"].build()
    other = FluxPipeline.from_pipe(pipe, scheduler=FlowMatchEulerDiscreteScheduler())
    other.set_progress_bar_config(disable=True)
    return pipe, other


def generate(pipe: Any, seed: int) -> Tensor:
    """Return two images of each of two prompts."""
    prompts, pooled = embeddings(2, 5, 16), embeddings(2, 16)
    is_modular = "Modular" in type(pipe).__name__
    arguments: dict[str, Any] = {"output": "latents", "num_images_per_prompt": 2}
    if not is_modular:  # it does not repeat given embeddings
        prompts, pooled = prompts.repeat_interleave(2, 0), pooled.repeat_interleave(2, 0)
        arguments = {"output_type": "latent"}
    with torch.no_grad():
        made = pipe(
            prompt_embeds=prompts,
            pooled_prompt_embeds=pooled,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=2,
            height=64,
            width=96,
            **arguments,
        )
    return made if is_modular else made.images


def pairs() -> dict[str, Any]:
    return {
        "modular": lambda: (pipe := modular(), pipe),
        "a copy": copied,
        "its model alone": lambda: ((pipe := FAMILIES["flux"].build()).transformer, pipe),
    }


@pytest.mark.parametrize("name", pairs())
def test_the_noise_of_references_follows_the_generator_of_the_call(name: str) -> None:
    given, running = pairs()[name]()
    # A bare model does not know how its scheduler adds noise.
    reference = Reference(embeddings(1, 24, 16, seed=5), noise=name != "its model alone")
    drawn: list[Tensor] = []

    def draw(seed: int) -> Tensor:
        torch.manual_seed(len(drawn))  # the noise must not depend on it
        images = generate(running, seed)
        drawn.append(noise_of(handle))
        return images

    with negtome_guidance(given, EVERY_TOKEN, reference=reference) as handle:
        images = draw(1)
        assert torch.equal(draw(1), images)
        draw(2)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def noise_of(handle: Any) -> Tensor:
    """Return the noise of the only reference."""
    (noise,) = handle._hooks[0]._references._noise
    return noise.clone()


@pytest.mark.parametrize("name", pairs())
def test_the_prompts_are_those_of_the_call(name: str) -> None:
    given, running = pairs()[name]()
    plain = generate(running, 1)
    with negtome_guidance(given, EVERY_TOKEN) as handle:
        guided = generate(running, 1)
    assert [torch.equal(guided[i], plain[i]) for i in range(4)] == [True, False, True, False]
    assert handle.summary().groups == 2


def test_the_guidance_of_a_copy_is_that_of_its_own_call() -> None:
    """Equal seeds: its latents look like halves of classifier-free guidance."""
    pipe = sdxl_pipeline()
    other = type(pipe).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    call = {
        "prompt_embeds": embeddings(1, 5, 16).repeat(2, 1, 1),
        "pooled_prompt_embeds": embeddings(1, 16).repeat(2, 1),
        "latents": embeddings(1, 4, 8, 12).repeat(2, 1, 1, 1),
        "guidance_scale": 1.0,
    }
    with negtome_guidance(pipe, EVERY_TOKEN) as handle, torch.no_grad():
        other(height=64, width=96, num_inference_steps=1, output_type="latent", **call)
    assert (handle.summary().parts, handle.summary().groups) == (1, 1)


def test_the_steps_of_a_copy_are_those_of_its_own_scheduler() -> None:
    pipe = sdxl_pipeline()
    other = type(pipe).from_pipe(pipe, scheduler=DDIMScheduler(timestep_spacing="trailing"))
    other.set_progress_bar_config(disable=True)
    call = {
        "prompt_embeds": embeddings(1, 5, 16).repeat(2, 1, 1),
        "pooled_prompt_embeds": embeddings(1, 16).repeat(2, 1),
        "guidance_scale": 1.0,
        "height": 64,
        "width": 96,
        "output_type": "latent",
    }
    with negtome_guidance(pipe, EVERY_TOKEN, steps=(0.0, 0.5)) as handle, torch.no_grad():
        pipe(num_inference_steps=10, **call)
        handle.reset()
        for steps in (4, 1, 1):
            other(num_inference_steps=steps, **call)
    assert (handle.summary().guided, handle.summary().forwards) == (4, 6)


def test_no_variable_of_the_pipeline_is_kept_after_its_call() -> None:
    pipe, other = copied()
    with negtome_guidance(pipe, EVERY_TOKEN, reference=Reference(embeddings(1, 24, 16))):
        generator = torch.Generator()
        kept = weakref.ref(generator)
        with torch.no_grad():
            other(
                prompt_embeds=embeddings(2, 5, 16),
                pooled_prompt_embeds=embeddings(2, 16),
                generator=generator,
                num_inference_steps=1,
                height=64,
                width=96,
                output_type="latent",
            )
        del generator
        gc.collect()
        assert kept() is None
