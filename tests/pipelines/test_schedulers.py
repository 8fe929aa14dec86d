"""Every scheduler of diffusers guides the steps that the settings name, or is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
import diffusers

from helpers.families.core import denoiser
from helpers.pipelines_fixtures import ALWAYS, built, generate
from negtome_fast.pipelines import negtome_guidance

pytestmark = pytest.mark.filterwarnings("ignore:__array_")  # of numpy 2, about diffusers

STEPS = 6
VELOCITY = {"prediction_type": "v_prediction"}
CONTINUOUS = {"timestep_type": "continuous"}

SERVED = [
    ("DDIM", {}),
    ("DDIM", {"timestep_spacing": "trailing"}),
    ("DDIMInverse", {}),
    ("DDPM", {}),
    ("CogVideoXDDIM", {}),
    ("DEISMultistep", {}),
    ("DPMSolverMultistep", {}),
    ("DPMSolverMultistep", {"use_karras_sigmas": True}),
    ("DPMSolverMultistep", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ("DPMSolverMultistepInverse", {}),
    ("DPMSolverSinglestep", {"lower_order_final": True}),
    ("EulerAncestralDiscrete", {}),
    ("EulerDiscrete", {}),
    ("EulerDiscrete", CONTINUOUS),
    ("EulerDiscrete", {"use_karras_sigmas": True}),
    ("HeunDiscrete", {}),
    ("HeunDiscrete", {"use_karras_sigmas": True}),
    ("KDPM2AncestralDiscrete", {}),
    ("KDPM2Discrete", {}),
    ("LCM", {}),
    ("LMSDiscrete", {}),
    ("PNDM", {"skip_prk_steps": True}),
    ("SASolver", {}),
    ("TCD", {}),
    ("UniPCMultistep", {}),
    ("UniPCMultistep", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
]
"""Schedulers of UNets whose timesteps go from 1000 (noise) to 0."""

REFUSED = [
    ("CMStochasticIterative", {}),
    ("EDMDPMSolverMultistep", {}),
    ("EDMEuler", {}),
    ("EDMEuler", {"sigma_max": 120.0, **VELOCITY}),  # CosXL
    ("EulerDiscrete", {**CONTINUOUS, **VELOCITY, "sigma_min": 0.002, "sigma_max": 700.0}),
    ("IPNDM", {}),
]
"""Their timesteps are logarithms of the noise, or its share."""

FLOW = [
    ("FlowMatchEulerDiscrete", {}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}),
    ("FlowMatchLCM", {}),
]

ELSEWHERE = """
    Amused BlockRefinement CogVideoXDPM ConsistencyDecoder DDIMParallel DDPMParallel
    DDPMWuerstchen DiscreteDDIM EntropyBound FlowMapEulerDiscrete FlowMatchHeunDiscrete Helios
    HeliosDMD KarrasVe LTXEulerAncestralRF MiniMaxH3 Piflow RFD4Proteina RePaint SCM ScoreSdeVe
    UnCLIP VQDiffusion
"""
"""They have the timesteps of another, or do not run in the pipelines of a UNet or of FLUX."""
WITHOUT_PACKAGE = "CosineDPMSolverMultistep DPMSolverSDE"
"""They need torchsde."""


def label(value: Any) -> str:
    words = value.values() if isinstance(value, dict) else [value]
    return "-".join(map(str, words))


@pytest.fixture
def pipe(name: str, settings: dict[str, Any]) -> Iterator[Any]:
    """A pipeline with this scheduler."""
    shared = built("flux" if name.startswith("FlowMatch") else "sd15")
    own = shared.scheduler
    shared.scheduler = getattr(diffusers, f"{name}Scheduler")(**settings)
    yield shared
    shared.scheduler = own


@contextmanager
def recorded(pipe: Any, scale: float) -> Iterator[list[tuple[float, int]]]:
    """Yield the timestep that the model is given, and the calls of the scheduler before it."""
    seen: list[tuple[float, int]] = []
    calls, step = [0], pipe.scheduler.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return step(*args, **kwargs)

    def forward(module: Any, args: Any, kwargs: Any) -> None:
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        seen.append((scale * float(torch.as_tensor(time).flatten()[0]), calls[0]))

    pipe.scheduler.step = counted
    try:
        with denoiser(pipe).register_forward_pre_hook(forward, with_kwargs=True):
            yield seen
    finally:
        del pipe.scheduler.step


@pytest.mark.parametrize(("name", "settings"), SERVED + FLOW, ids=label)
def test_the_forwards_in_the_window_are_guided(
    pipe: Any, name: str, settings: dict[str, Any]
) -> None:
    scale = 1000 if name.startswith("FlowMatch") else 1
    with recorded(pipe, scale) as seen, negtome_guidance(pipe, ALWAYS, t_end=600) as handle:
        generate(pipe, 2, size=(16, 16), steps=STEPS)
    inside = sum(599.99 <= t <= 1000.01 for t, _ in seen)
    assert handle.summary().guided == inside and handle.summary().forwards == len(seen)
    assert 0 < inside < len(seen)
    with recorded(pipe, scale) as seen, negtome_guidance(pipe, ALWAYS, first_steps=2) as handle:
        generate(pipe, 2, size=(16, 16), steps=STEPS)
    expected = sum(calls < 2 * pipe.scheduler.order for _, calls in seen)
    # PNDM computes its second step twice.
    assert handle.summary().guided == expected + (name == "PNDM")


@pytest.mark.parametrize(("name", "settings"), REFUSED, ids=label)
def test_another_scale_is_refused_and_steps_are_served(pipe: Any) -> None:
    for window in ({"t_end": 800}, {"t_end": 0}):
        with (
            negtome_guidance(pipe, ALWAYS, **window) as handle,
            pytest.raises(ValueError, match=r"does not count .* steps=.* first_steps=3"),
        ):
            generate(pipe, 2, size=(16, 16), steps=STEPS)
        assert handle.summary().forwards == 0
    for window in ({"first_steps": 2}, {"steps": (0.0, 0.3)}):
        with recorded(pipe, 1) as seen, negtome_guidance(pipe, ALWAYS, **window) as handle:
            generate(pipe, 2, size=(16, 16), steps=STEPS)
        assert (handle.summary().guided, len(seen)) == (2, STEPS)


def test_every_scheduler_of_diffusers_is_in_a_table() -> None:
    """A new one has to be looked at: its scale of time may be another."""
    names = {
        name.removesuffix("Scheduler")
        for name in dir(diffusers)
        if re.fullmatch(r"\w+Scheduler", name)
    }
    known = {name for name, _ in SERVED + REFUSED + FLOW}
    known |= {*ELSEWHERE.split(), *WITHOUT_PACKAGE.split()}
    assert names - known == set()
