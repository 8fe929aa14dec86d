"""The window of guided steps, in timesteps and in steps of a run."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
from helpers.pipelines_fixtures import ALWAYS, TEXT, flux_pipeline, generate
from negtome_fast.pipelines import (
    apply_negtome,
    negtome_guidance,
)
from negtome_fast.pipelines.schedule import PipelineSchedule


@pytest.mark.parametrize("begin", [2, None], ids=["begin_index", "no begin_index"])
def test_image_to_image_counts_its_own_steps(begin: int | None) -> None:
    """It leaves out the first timesteps of the schedule: here two of five."""

    class Pipe:
        _num_timesteps = 3

        def __init__(self) -> None:
            timesteps = torch.tensor([900.0, 700.0, 500.0, 300.0, 100.0])
            self.scheduler = SimpleNamespace(timesteps=timesteps, begin_index=begin)

        def __call__(self) -> None:
            schedule = PipelineSchedule(self)
            assert schedule.locate(500.2, 1.0) == (500.0, 0, 3)
            assert schedule.locate(100.0, 0.0) == (100.0, 2, 3)
            assert schedule.locate(400.0, 1.0) is None

    Pipe()()


@pytest.mark.parametrize("begin_index", [True, False])
def test_a_run_that_ends_early_counts_from_its_first_step(sdxl: Any, begin_index: bool) -> None:
    """SDXL with a refiner: 12 of 20 timesteps, of which the first quarter is guided."""
    if not begin_index:
        sdxl.scheduler.set_begin_index = lambda index=0: None
    with negtome_guidance(sdxl, ALWAYS, steps=(0.0, 0.25), blocks="up_blocks.0") as handle:
        generate(sdxl, 2, size=(32, 32), steps=20, denoising_end=0.6)
    vars(sdxl.scheduler).pop("set_begin_index", None)
    assert (handle.summary().guided, handle.summary().forwards) == (3, 12)


@pytest.mark.parametrize(
    ("settings", "guided"),
    [
        ({"t_end": 900}, 1),
        ({"t_start": 900, "t_end": 700}, 1),
        ({"t_end": 750}, 2),
        ({"steps": (0.0, 0.25)}, 1),
        ({"steps": (0.25, 1.0)}, 3),
    ],
    ids=str,
)
def test_the_window_in_timesteps_and_in_steps(
    flux: Any, settings: dict[str, Any], guided: int
) -> None:
    """Four steps of FLUX without shifting, at 1000, 750, 500 and 250."""
    with negtome_guidance(flux, ALWAYS, **settings) as handle:
        generate(flux, 2, steps=4, sigmas=[1.0, 0.75, 0.5, 0.25])
    assert (handle.summary().guided, handle.summary().forwards) == (guided, 4)


def test_a_timestep_rounded_to_bf16_is_read_from_the_scheduler() -> None:
    """900 / 1000 in bf16 is 898.4, which lies outside of the authors' window."""
    pipe = flux_pipeline()
    pipe.transformer.to(torch.bfloat16)
    with negtome_guidance(pipe, ALWAYS, t_end=900) as handle:
        timesteps = []
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: timesteps.append(kwargs["timestep"]), with_kwargs=True
        )
        original = pipe.scheduler.set_timesteps

        @functools.wraps(original)
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            pipe.scheduler.timesteps.copy_(torch.tensor([1000.0, 900.0, 895.0, 500.0]))

        pipe.scheduler.set_timesteps = set_timesteps
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            pipe(
                prompt_embeds=torch.randn(2, TEXT, 16, generator=random).bfloat16(),
                pooled_prompt_embeds=torch.randn(2, 16, generator=random).bfloat16(),
                height=32,
                width=32,
                num_inference_steps=4,
                output_type="latent",
            )
        hook.remove()
    assert timesteps[1].dtype == torch.bfloat16 and timesteps[1][0].item() * 1000 < 899
    assert handle.summary().guided == 2


def test_steps_need_the_pipeline(flux: Any) -> None:
    with pytest.raises(ValueError, match="pass the pipeline"):
        apply_negtome(flux.transformer, steps=(0.0, 0.5))
