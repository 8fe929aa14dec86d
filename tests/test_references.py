"""References from outside of the batch, on whole diffusers pipelines with tiny random models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from pipelines_fixtures import flux_pipeline, generate, sd_pipeline, sdxl_pipeline

from negtome_fast import Reference
from negtome_fast.config import NegToMeConfig
from negtome_fast.pipelines import negtome_guidance

FAMILIES = {"flux": flux_pipeline, "sd15": sd_pipeline, "sdxl": sdxl_pipeline}
ALWAYS = NegToMeConfig(threshold=0.1, t_end=0)
_pipelines: dict[str, Any] = {}


def built(family: str) -> Any:
    if family not in _pipelines:
        _pipelines[family] = FAMILIES[family]()
    return _pipelines[family]


def denoiser(pipe: Any) -> nn.Module:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    hooks = denoiser(built(request.param))._forward_pre_hooks
    assert not hooks


class Watch:
    """What the denoiser is given and answers, by forward, of the run's items."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.latents: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __enter__(self) -> Watch:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.latents.append(args[0] if args else kwargs["hidden_states"])

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.outputs.append(output[0])

        model = denoiser(self._pipe)
        self._hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def predictions(pipe: Any, images: int = 4, **arguments: Any) -> list[Tensor]:
    """The denoiser's outputs in the first step."""
    with Watch(pipe) as seen:
        generate(pipe, images, steps=1, **arguments)
    return seen.outputs


def first_latents(pipe: Any, **arguments: Any) -> Tensor:
    """The first item's latents in the first step, before the scheduler scales them."""
    with Watch(pipe) as seen:
        generate(pipe, steps=1, **arguments)
    sigma = pipe.scheduler.sigmas[0] if type(pipe.scheduler).__name__.startswith("Euler") else 0.0
    return seen.latents[0][:1] * (sigma**2 + 1) ** 0.5


@pytest.fixture
def exact() -> Iterator[None]:
    """In fp64 a batch of another size rounds too little to decide between two equal tokens."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("cfg", [False, True], ids=["plain", "cfg"])
@pytest.mark.usefixtures("exact")
def test_the_first_image_given_as_a_reference_guides_as_it_does_in_the_batch(
    family: str, cfg: bool
) -> None:
    pipe = FAMILIES[family]()
    reference = Reference(first_latents(pipe), noise=False)
    with negtome_guidance(pipe, ALWAYS) as inside:
        expected = predictions(pipe, cfg=cfg)
    with negtome_guidance(pipe, ALWAYS, reference=reference) as outside:
        guided = predictions(pipe, cfg=cfg)
    for one, other, plain in zip(guided, expected, predictions(pipe, cfg=cfg), strict=True):
        # In the batch, the first item of each half is the reference and stays as it is.
        others = [i for i in range(len(one)) if i % 4]
        torch.testing.assert_close(one[others], other[others], atol=1e-6, rtol=1e-6)
        assert (other[others] - plain[others]).abs().max() > 1e-3
    counted = [(r.block, r.grid, r.calls) for r in inside.summary().rows]
    assert [(r.block, r.grid, r.calls) for r in outside.summary().rows] == counted
    assert outside.summary().forwards == inside.summary().forwards
