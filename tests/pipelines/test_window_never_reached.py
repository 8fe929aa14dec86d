"""Runs whose window no step reaches are told once, with a window that works."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
import diffusers

from helpers.families.core import seeded
from helpers.pipelines_fixtures import ALWAYS, built, generate, sd_pipeline
from negtome_fast.config import NegToMeConfig
from negtome_fast.pipelines import apply_negtome, negtome_guidance
from negtome_fast.pipelines.api import NegToMeHandle

AUTHORS = {"sdxl": (1000, 800), "flux": (1000, 900)}
"""The authors' windows."""
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
    "latent_channels": 4,
}


def settings(family: str) -> NegToMeConfig:
    start, end = AUTHORS[family]
    return ALWAYS.with_overrides(t_start=start, t_end=end)


@contextmanager
def told() -> Iterator[list[str]]:
    """Yield the warnings about a window that is not reached, as they come."""
    found: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")

        def show(message: Any, *_: Any) -> None:
            if "no step of this run" in str(message):
                found.append(str(message))

        warnings.showwarning = show  # type: ignore[assignment]
        yield found


def image_to_image(family: str, **arguments: Any) -> Any:
    """Return a pipeline that shares the family's denoiser, and run it on random pictures."""
    cls = {"sdxl": "StableDiffusionXLImg2ImgPipeline", "flux": "FluxImg2ImgPipeline"}[family]
    shift = {"shift_factor": 0.1} if family == "flux" else {}
    pipe = getattr(diffusers, cls)(
        **{**built(family).components, "vae": seeded(diffusers.AutoencoderKL, **VAE, **shift)}
    )
    pipe.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(3)
    embeds, pooled = (torch.randn(1, *s, 16, generator=random) for s in ((5,), ()))

    def run(**more: Any) -> None:
        with torch.no_grad():
            pipe(
                image=torch.rand(2, 3, 32, 32, generator=random),
                prompt_embeds=embeds.repeat(2, 1, 1),
                pooled_prompt_embeds=pooled.repeat(2, 1),
                guidance_scale=1.0,
                output_type="latent",
                **({} if family == "sdxl" else {"height": 32, "width": 32}),
                **{**arguments, **more},
            )

    pipe.run = run
    return pipe


def advised(message: str) -> list[dict[str, Any]]:
    """Return the windows that a message advises."""
    found = re.findall(r"(first_steps|steps|t_end)=(\([^)]*\)|[\d.]+)", message.split("Use ")[1])
    return [{name: eval(value)} for name, value in found]


@pytest.mark.parametrize(
    ("family", "arguments", "first"),
    [
        ("sdxl", {"strength": 0.6, "num_inference_steps": 20}, 578.368),
        ("sdxl", {"denoising_start": 0.8, "num_inference_steps": 20}, 157.737),
        ("flux", {"strength": 0.8, "num_inference_steps": 10}, 800),
    ],
    ids=["sdxl 0.6", "sdxl refiner", "flux 0.8"],
)
def test_image_to_image_is_told_at_its_first_forward_and_the_advice_works(
    family: str, arguments: dict[str, Any], first: float
) -> None:
    pipe = image_to_image(family, **arguments)
    handle = apply_negtome(pipe, settings(family))
    model = getattr(pipe, "unet", None) or pipe.transformer
    when: list[int] = []
    with told() as messages:
        hook = model.register_forward_pre_hook(lambda *_: when.append(len(messages)))
        pipe.run()
        hook.remove()
    assert when[0] == 1 and len(messages) == 1
    summary = handle.summary()
    assert summary.verdict == "not guided" and summary.guided == 0 < summary.forwards
    assert summary.first_timestep == pytest.approx(first, abs=0.01)
    begins, window = f"timestep {summary.first_timestep:.4g}", handle.config.window
    assert begins in messages[0] and window in messages[0] and begins in str(summary)
    assert summary.notes == tuple(messages)
    windows = advised(messages[0])
    assert [set(one) for one in windows] == [{"first_steps"}, {"steps"}]
    for one in windows:
        handle.update(**{"first_steps": None, "steps": None, **one})
        handle.reset()
        with told() as messages:
            pipe.run()
        assert not messages and handle.summary().verdict == "guided"
        assert 0 < handle.summary().guided < handle.summary().forwards
    handle.remove()


def test_each_run_is_told_once() -> None:
    pipe = image_to_image("sdxl", strength=0.6, num_inference_steps=10)
    with told() as messages, negtome_guidance(pipe, settings("sdxl")):
        pipe.run()
        pipe.run()
        generate(built("sdxl"), 2, size=(32, 32), steps=5)
    assert len(messages) == 2


def test_a_pipeline_that_shares_the_guided_model_is_told_in_its_second_step(sdxl: Any) -> None:
    """The settings were given for another pipeline, so the schedule is not known for certain."""
    pipe = image_to_image("sdxl", strength=0.6, num_inference_steps=10)
    with told() as messages, negtome_guidance(sdxl, settings("sdxl")) as handle:
        generate(sdxl, 2, size=(32, 32), steps=5)
        assert not messages and handle.summary().verdict == "guided"
        pipe.run()
    assert len(messages) == 1 and "t_end=" in messages[0]
    assert handle.summary().notes == tuple(messages)


@pytest.mark.parametrize(
    ("spacing", "window", "first"),
    [("leading", (1000, 800), 751), ("trailing", (900, 800), 999)],
    ids=["below", "none between"],
)
def test_few_steps_may_miss_the_window(
    spacing: str, window: tuple[float, float], first: int
) -> None:
    """Four steps of DDIM are at 751, 501, 251 and 1, or at 999, 749, 499 and 249."""
    pipe = sd_pipeline()
    pipe.scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    chosen = ALWAYS.with_overrides(t_start=window[0], t_end=window[1])
    with told() as messages, negtome_guidance(pipe, chosen) as handle:
        generate(pipe, 2, size=(32, 32), steps=4)
    assert len(messages) == 1 and f"begins at timestep {first}," in messages[0]
    assert "first_steps=1" in messages[0] and handle.summary().verdict == "not guided"


@pytest.mark.parametrize("window", [(0.9, 0.95), (0.8, 0.99)])
def test_a_share_of_the_steps_may_hold_none(flux: Any, window: tuple[float, float]) -> None:
    with told() as messages, negtome_guidance(flux, ALWAYS, steps=window) as handle:
        generate(flux, 2, size=(32, 32), steps=4)
    assert len(messages) == 1 and "of 4 steps" in messages[0]
    assert handle.summary().verdict == "not guided"
    for advice in advised(messages[0]):
        other = {"steps": None, **advice}
        with told() as again, negtome_guidance(flux, ALWAYS, **other) as handle:
            generate(flux, 2, size=(32, 32), steps=4)
        assert not again and handle.summary().guided == 1


def without_a_word(handle: NegToMeHandle, messages: list[str]) -> None:
    assert handle.summary().guided > 0
    handle.remove()
    assert not messages


def test_settings_that_a_callback_changes_are_judged_when_the_run_is_over(sdxl: Any) -> None:
    def late(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        handle.update(t_end=0)
        return tensors

    def never(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        handle.summary()  # in the middle of a run nothing is said
        assert not messages
        return tensors

    below = ALWAYS.with_overrides(t_start=400, t_end=390)
    with told() as messages:
        handle = apply_negtome(sdxl, below)
        generate(sdxl, 2, size=(32, 32), steps=4, callback_on_step_end=late)
        without_a_word(handle, messages)
        handle = apply_negtome(sdxl, below)
        generate(sdxl, 2, size=(32, 32), steps=4, callback_on_step_end=never)
        assert not messages
        handle.summary()
        handle.remove()
    assert len(messages) == 1


def test_a_run_that_goes_on_with_a_guided_one_is_not_told(sdxl: Any) -> None:
    """A base run ends early, and another call takes its latents on from there."""
    with told() as messages:
        pipe = image_to_image("sdxl", num_inference_steps=10)
        handle = apply_negtome(pipe, settings("sdxl"))
        pipe.run(strength=1.0, denoising_end=0.5)
        pipe.run(denoising_start=0.5)
        without_a_word(handle, messages)


def test_rising_timesteps_are_one_run() -> None:
    """Inversion goes from the image to noise; the window lies at its end."""
    pipe = sd_pipeline()
    pipe.scheduler = diffusers.DDIMInverseScheduler()
    with told() as messages:
        handle = apply_negtome(pipe, settings("sdxl"))
        generate(pipe, 2, size=(32, 32), steps=10)
        without_a_word(handle, messages)


def bare_run(model: Any, timesteps: list[float]) -> None:
    random = torch.Generator().manual_seed(0)
    sample, text = (torch.randn(2, *s, generator=random) for s in ((4, 4, 4), (5, 16)))
    with torch.no_grad():
        for timestep in timesteps:
            model(sample, timestep, text)


def test_a_bare_model_is_told_when_its_time_has_fallen_below() -> None:
    model = sd_pipeline().unet
    with told() as messages, negtome_guidance(model, settings("sdxl"), groups=1) as handle:
        bare_run(model, [580.0])
        assert not messages  # one forward has no direction
        bare_run(model, [560.0, 540.0, 520.0])
        assert len(messages) == 1 and "timestep 580" in messages[0]
        (advice,) = advised(messages[0])
        handle.update(**advice)
        bare_run(model, [580.0, 560.0])
        bare_run(model, [999.0, 900.0, 700.0, 500.0])
    assert len(messages) == 1 and handle.summary().guided > 0


def test_two_denoisers_are_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of Wan 2.2 never sees the noise; only all forwards together count."""
    unet = sd_pipeline().unet
    other = seeded(type(unet), **{k: v for k, v in unet.config.items() if k[0] != "_"})

    class Pipe:
        transformer, transformer_2 = unet, other
        scheduler = SimpleNamespace(timesteps=torch.tensor([999.0, 900.0, 600.0, 300.0]))

        def __call__(self) -> None:
            self.scheduler.timesteps = self.scheduler.timesteps.clone()
            bare_run(unet, [999.0, 900.0])
            bare_run(other, [600.0, 300.0])

    pipe = Pipe()
    with told() as messages:
        handle = apply_negtome(pipe, settings("sdxl"), groups=1)
        pipe()
        without_a_word(handle, messages)
        handle = apply_negtome(pipe, settings("sdxl"), groups=1, t_start=850)
        pipe()
        pipe()
        handle.remove()
    assert len(messages) == 2


def test_forwards_of_a_step_count_once(flux: Any) -> None:
    """True classifier-free guidance calls FLUX twice a step."""
    latents: list[Tensor] = []
    for cfg, forwards in ((False, 2), (True, 4)):
        with negtome_guidance(flux, ALWAYS, first_steps=2) as handle:
            latents.append(generate(flux, 2, size=(32, 32), steps=4, cfg=cfg))
        assert handle.summary().guided == forwards == handle.summary().forwards // 2
        assert handle.summary().window == "first_steps=2"


def test_the_number_of_steps_needs_the_pipeline(flux: Any) -> None:
    with pytest.raises(ValueError, match=r"first_steps=2 needs .* pass the pipeline"):
        apply_negtome(flux.transformer, first_steps=2)
