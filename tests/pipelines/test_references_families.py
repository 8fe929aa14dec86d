"""References from outside of the batch: recorded and applied in all families, and encoded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from PIL import Image

from helpers.families import FAMILIES, Family
from helpers.families.core import denoiser
from helpers.families.videos import WAN_VAE
from negtome_fast import Reference
from negtome_fast.config import NegToMeConfig
from negtome_fast.pipelines import encoders, known_layouts, negtome_guidance
from negtome_fast.pipelines.references import at_timestep

IMAGES = 3
EVERY_TOKEN = NegToMeConfig(threshold=-1, t_end=0, alpha=0.5, groups=1)
SINGLE_PRECISION = ("kandinsky 5",)
"""Families whose models compute parts in fp32, whatever the dtype of their input."""
CACHED = ("flux2-klein-kv", "qwen-2.1")
"""Families whose pipelines keep keys and values of one forward for the next one."""
LATENTS_ONLY = (
    "CosmosTransformer3DModel",
    "JoyImageEditPlusTransformer3DModel",
    "JoyImageEditTransformer3DModel",
)
"""Denoisers whose references must be given as latents.

Cosmos scales its latents by itself, and JoyImage's latents also hold the images to edit.
"""


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Set fp64 as default: the batch size must not decide between tokens that are nearly equal."""
    single = request.node.callspec.params["name"] in SINGLE_PRECISION
    torch.set_default_dtype(torch.float32 if single else torch.float64)
    yield torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)


class FirstForward:
    """Run of one step that returns the latents and the output of the model's first forward."""

    def __init__(self, family: Family) -> None:
        self.pipe, self._family = family.build(), family
        self.model = denoiser(self.pipe)
        self._latents = known_layouts()[family.model].latents
        self._signature = inspect.signature(type(self.model).forward)

    def __call__(self) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        answers: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            latents = self._signature.bind_partial(module, *args, **kwargs).arguments[self._latents]
            seen.append(stacked(latents).clone())

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            answers.append(stacked(output[0]).clone())

        family = self._family
        with (
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(after),
            torch.no_grad(),
        ):
            family.generate(self.pipe, IMAGES, steps=1, captions=family.captions())
        return seen[0], answers[0]


def stacked(value: Any) -> Tensor:
    """Return a tensor, or the last entry of each list stacked to one."""
    while isinstance(value, (list, tuple)) and not isinstance(value[0], Tensor):
        value = [item[-1] for item in value]
    return value if isinstance(value, Tensor) else torch.stack(list(value))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in CACHED])
def test_the_first_image_given_as_a_reference_guides_as_it_does_in_the_batch(
    name: str, dtype: torch.dtype
) -> None:
    run = FirstForward(FAMILIES[name])
    latents, plain = run()
    # A bare model has no scheduler, so the latents are given to it as they are.
    with negtome_guidance(run.model, EVERY_TOKEN):
        inside = run()[1]
    with negtome_guidance(run.model, EVERY_TOKEN, reference=Reference(latents[:1], noise=False)):
        outside = run()[1]
    tolerance = 1e-5 if dtype is torch.float32 else 1e-6
    torch.testing.assert_close(outside[1:], inside[1:], atol=tolerance, rtol=tolerance)
    assert (inside[1:] - plain[1:]).abs().max() > 10 * tolerance
    assert torch.equal(run()[1], plain)


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_between_forwards_is_refused(name: str) -> None:
    run = FirstForward(FAMILIES[name])
    latents, plain = run()
    reference = Reference(latents[:1], noise=False)
    with (
        negtome_guidance(run.model, EVERY_TOKEN, reference=reference),
        pytest.raises(ValueError, match="is called with a cache"),
    ):
        run()
    assert torch.equal(run()[1], plain)


def test_every_family_encodes_pictures() -> None:
    without = {name for name, layout in known_layouts().items() if layout.encode is None}
    assert without == set(LATENTS_ONLY)


LATENTS = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
VIDEO = torch.randn(1, 4, 3, 8, 12, generator=torch.Generator().manual_seed(0))


def test_latents_are_packed_as_the_pipelines_pack_them() -> None:
    from diffusers import Flux2Pipeline, FluxPipeline, LTXPipeline, QwenImagePipeline
    from diffusers.pipelines.bria_fibo.pipeline_bria_fibo import BriaFiboPipeline

    size = (1, 4, 8, 12)
    assert torch.equal(encoders.pack_2x2(LATENTS), FluxPipeline._pack_latents(LATENTS, *size))
    one = LATENTS[:, :, None]
    assert torch.equal(encoders.pack_2x2(one), QwenImagePipeline._pack_latents(LATENTS, *size))
    assert torch.equal(encoders.pack_pixels(VIDEO), LTXPipeline._pack_latents(VIDEO))
    assert torch.equal(encoders.pack_pixels(LATENTS), Flux2Pipeline._pack_latents(LATENTS))
    packed = BriaFiboPipeline._pack_latents_no_patch(LATENTS, *size)
    assert torch.equal(encoders.pack_pixels(one), packed)


def vae_of(**config: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(**config))


def test_latents_are_normalised_by_what_the_vae_tells() -> None:
    from diffusers import Flux2Pipeline

    shifted = encoders.normalise(vae_of(scaling_factor=0.5, shift_factor=0.25), LATENTS)
    torch.testing.assert_close(shifted, (LATENTS - 0.25) * 0.5)
    torch.testing.assert_close(
        encoders.normalise(vae_of(scaling_factor=0.5, shift_factor=None), LATENTS), LATENTS * 0.5
    )
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    expected = (VIDEO - torch.tensor(mean).view(1, 4, 1, 1, 1)) / torch.tensor(std).view(
        1, 4, 1, 1, 1
    )
    wan = vae_of(latents_mean=mean, latents_std=std)
    torch.testing.assert_close(encoders.normalise(wan, VIDEO), expected)
    ltx = nn.Module()
    ltx.config = vae_of(scaling_factor=2.0).config
    ltx.register_buffer("latents_mean", torch.tensor(mean))
    ltx.register_buffer("latents_std", torch.tensor(std))
    torch.testing.assert_close(encoders.normalise(ltx, VIDEO), expected * 2)
    glm = vae_of(scaling_factor=0.18, latents_mean=mean, latents_std=std)
    torch.testing.assert_close(encoders.standardise(glm, VIDEO), expected)
    flux2 = vae_of(batch_norm_eps=1e-4)
    flux2.bn = nn.BatchNorm2d(16)
    flux2.bn.running_mean += 0.3
    patches = Flux2Pipeline._patchify_latents(LATENTS)
    torch.testing.assert_close(
        encoders.patchify_and_normalise(flux2, LATENTS), (patches - 0.3) / (1 + 1e-4) ** 0.5
    )


def test_an_inverted_schedule_is_noised_the_other_way_round() -> None:
    """The sigmas of Mochi and OmniGen run from 0 (noise) to 1."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    clean, noise = LATENTS, torch.flip(LATENTS, [3])
    for inverted in (False, True):
        scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=inverted)
        scheduler.set_timesteps(5)
        scheduler._step_index, scheduler._begin_index = 1, 0
        sigma = scheduler.sigmas[1]
        share = 1 - sigma if inverted else sigma  # share of the noise, first 1
        given = at_timestep(clean, noise, (scheduler, scheduler.timesteps[1:2]))
        torch.testing.assert_close(given, (1 - share) * clean + share * noise)
        assert share > 0.5


def test_sigmas_that_are_no_shares_are_refused() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[80.0, 1.0])
    with pytest.raises(ValueError, match=r"above 1.*noise=False"):
        at_timestep(LATENTS, LATENTS, (scheduler, scheduler.timesteps[:1]))


def frames(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(count)
    ]


@pytest.mark.parametrize("source", ["video", "image"])
def test_a_video_is_pushed_away_from_a_video(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is sampled to the number of frames of the run and encoded by the VAE."""
    family = FAMILIES["wan"]
    pipe = family.build()
    pipe.vae = WAN_VAE.build()
    pipe.vae.config.latents_mean = [0.1, 0.2, 0.3, 0.4]
    seen: list[Tensor] = []
    forward = type(pipe.transformer).forward

    @functools.wraps(forward)  # a function of another name would be taken for a step cache
    def record(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(forward).bind(*args, **kwargs)
        seen.append(bound.arguments["hidden_states"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "forward", record)

    def run() -> Tensor:
        return family.generate(pipe, 1, steps=1)

    with torch.no_grad():
        plain = run()
        given = frames(17) if source == "video" else frames(1)[0]
        mask = np.zeros((64, 96), dtype=bool)
        mask[:, :48] = True
        reference = Reference(given, mask=mask, noise=False)
        with negtome_guidance(pipe, EVERY_TOKEN, reference=reference) as handle:
            guided = run()
        count = 4 * family.frames - 3
        chosen = [given[2 * i] for i in range(count)] if source == "video" else [given] * count
        resized = [frame.resize((96, 64), Image.Resampling.LANCZOS) for frame in chosen]
        pixels = torch.from_numpy(np.stack(resized)).permute(3, 0, 1, 2)[None] / 127.5 - 1
        expected = pipe.vae.encode(pixels).latent_dist.mode()
    expected = expected - torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1, 1)
    torch.testing.assert_close(seen[1], expected)
    assert not torch.equal(guided, plain)
    assert {row.grid for row in handle.summary().rows} == family.grids[(64, 96)]


def test_an_image_model_refuses_a_video() -> None:
    family = FAMILIES["flux"]
    pipe = family.build()
    pipe.vae = SimpleNamespace()  # only its presence is checked
    with (
        negtome_guidance(pipe, EVERY_TOKEN, reference=Reference(frames(2))),
        pytest.raises(ValueError, match=r"reference 0 is a video.*one frame"),
    ):
        family.generate(pipe, 1, steps=1)
