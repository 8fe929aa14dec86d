"""Ideogram 4's whole pipeline: two denoisers, one with text and one without, guided as one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from diffusers import Ideogram4Pipeline

from helpers.families import FAMILIES
from helpers.families.core import PipelineFamily, embeddings
from helpers.families.images import FLUX2_VAE
from helpers.perturbation import disagreements
from negtome_fast.config import NegToMeConfig
from negtome_fast.pipelines import Reference, negtome_guidance

IMAGES = 3
CHANNELS = 16
ALWAYS = NegToMeConfig(threshold=-1, t_end=0)


class Pipeline(Ideogram4Pipeline):
    """Ideogram 4's pipeline with random embeddings; a prompt is the number of its tokens."""

    def encode_prompt(
        self,
        prompt: str | list[str],
        grid_h: int,
        grid_w: int,
        max_sequence_length: int,
        device: torch.device,
    ) -> tuple[Tensor, ...]:
        lengths = [int(words) for words in prompt]
        ids = self._prepare_ids(lengths, grid_h, grid_w, max_sequence_length, device)
        text = embeddings(1, max_sequence_length + grid_h * grid_w, CHANNELS)
        return text.repeat(len(lengths), 1, 1), *ids


IDEOGRAM4 = PipelineFamily(
    FAMILIES["ideogram4"].denoiser,
    lambda: Pipeline,
    {},
    more={
        "prompt": lambda run: [str(length) for length in run.captions],
        "max_sequence_length": 12,
        "guidance_schedule": None,
    },
    scale=("guidance_scale", 3.0),
    parts={"unconditional_transformer": FAMILIES["ideogram4"].denoiser, "vae": FLUX2_VAE},
    cfg=False,
    several_captions=True,
)


@pytest.mark.parametrize("placement", ["output", "pre_projection"])
@pytest.mark.parametrize("part", ["transformer", "unconditional_transformer"])
def test_the_image_alone_is_guided_in_both(part: str, placement: str) -> None:
    pipe = IDEOGRAM4.build()
    model = getattr(pipe, part)
    assert disagreements(IDEOGRAM4, pipe, model=model, placement=placement) == []


def generate(pipe: Any, **settings: Any) -> Tensor:
    with torch.no_grad():
        return IDEOGRAM4.generate(pipe, IMAGES, captions=(5, 7, 3), **settings)


def test_both_are_guided_as_one() -> None:
    """The prompts differ, so that their captions have several lengths."""
    pipe = IDEOGRAM4.build()
    before = generate(pipe, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with negtome_guidance(pipe, ALWAYS, steps=(0.0, 0.5), groups=1) as handle:
            guided = generate(pipe, steps=2)
    summary = handle.summary()
    assert (summary.forwards, summary.guided, summary.groups) == (4, 2, 1)
    assert {(row.calls, row.tokens, row.grid) for row in summary.rows} == {(2, 96, (4, 6))}
    assert torch.equal(guided[0], before[0])
    assert not torch.equal(guided[1], before[1]) and not torch.equal(guided[2], before[2])
    assert torch.equal(generate(pipe, steps=2), before)


def test_a_reference_is_encoded_once_for_both() -> None:
    pipe = IDEOGRAM4.build()
    calls: list[Tensor] = []
    encode = pipe.vae.encode
    pipe.vae.encode = lambda pixels: calls.append(pixels) or encode(pixels)
    picture = Reference((embeddings(64, 96, 3).sigmoid() * 255).byte().numpy())
    before = generate(pipe, steps=2)
    with negtome_guidance(pipe, ALWAYS, reference=picture) as handle:
        guided = generate(pipe, steps=2)
    assert [tuple(pixels.shape) for pixels in calls] == [(1, 3, 64, 96)]
    assert handle.summary().guided == 4
    assert all(not torch.equal(one, other) for one, other in zip(guided, before, strict=True))


def test_a_picture_is_encoded_as_the_pipeline_decodes_it() -> None:
    """The pipeline's own steps from latents to the VAE's input, on latents that were encoded."""
    pipe = IDEOGRAM4.build()
    encoder = pipe_encoder()
    with torch.no_grad():
        pipe.vae.bn.running_mean.copy_(embeddings(16))
        pipe.vae.bn.running_var.copy_(embeddings(16, seed=4).exp())
    latents = embeddings(1, 4, 8, 12)
    packed = encoder.pack(encoder.normalise(pipe.vae, latents))
    decoded: list[Tensor] = []
    pipe.vae.decode = lambda z, **_: decoded.append(z) or (torch.zeros(1, 3, 64, 96),)
    pipe.scheduler.step = lambda velocity, t, latents, **_: (packed,)
    with torch.no_grad():
        pipe(
            ["5"],
            64,
            96,
            num_inference_steps=1,
            guidance_scale=3.0,
            guidance_schedule=None,
            max_sequence_length=12,
        )
    torch.testing.assert_close(decoded[0], latents)


def pipe_encoder() -> Any:
    from negtome_fast.pipelines import known_layouts

    return known_layouts()["Ideogram4Transformer2DModel"].encode
