"""The ComfyUI nodes, compared with what a change to latents, to the batch or a counter shows.

None of these tests reads the table of places; one plants errors in it, and they are found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.comfyui_double import (
    CHANNELS,
    TEXT,
    Attended,
    BaseModel,
    ModelPatcher,
    UNetModel,
    Vae,
    draw,
    sample,
)
from helpers.comfyui_models import MODELS, VIDEO
from helpers.comfyui_oracle import Run, check_tokens, handed
from negtome_fast.integrations.comfyui import nodes, places

SETTINGS = {"alpha": 0.9, "threshold": 0.0, "window": "percent", "start": 0.0, "end": 1.0}
EDITED = "QwenImageTransformer2DModel with a given image"
NAMES = (*MODELS, EDITED)


def model(name: str) -> ModelPatcher:
    if name == "UNetModel":
        return ModelPatcher(BaseModel(UNetModel(levels=2)))
    return ModelPatcher(BaseModel(MODELS[name.split()[0]]()))


def guided(patcher: ModelPatcher, **settings: Any) -> ModelPatcher:
    (clone,) = nodes.batch_diversity(patcher, **{**SETTINGS, "reference": "first", **settings})
    return clone


def noise_for(name: str, batch: int) -> torch.Tensor:
    return draw(batch, 4, *([3] if name in VIDEO else []), 8, 12, seed=1)


def given(name: str, batch: int) -> dict[str, Any]:
    return {"ref_latents": [draw(1, 4, 4, 6).expand(batch, -1, -1, -1)]} if name == EDITED else {}


def observer(name: str, joined: bool = True) -> Run:
    patcher = guided(model(name), alpha=0.0)

    def run(noise: torch.Tensor) -> tuple[list[torch.Tensor], list[Any]]:
        attended: list[torch.Tensor] = []
        network = patcher.model.diffusion_model
        sample_once = {"noise": noise, "sigmas": (1.0, 0.0), **given(name, len(noise))}
        sample(patcher, len(noise), joined, **sample_once)  # makes the modules
        kinds = [one for one in network.modules() if isinstance(one, Attended)]
        hooks = [
            one.register_forward_hook(lambda _, __, output: attended.append(output.clone()))
            for one in kinds
        ]
        with handed() as calls:
            sample(patcher, len(noise), joined, **sample_once)
        for hook in hooks:
            hook.remove()
        return attended, calls

    return run


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_that_move_with_the_latents_are_those_that_are_guided(name: str) -> None:
    check_tokens(observer(name), noise_for(name, 2))


ERRORS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a missing place": ("Flux", lambda known: known[:1]),
    "text taken for image": (
        "Flux",
        lambda known: (known[0], replace(known[1], order="image_first")),
    ),
    "image taken for text": (
        "HunyuanVideo",
        lambda known: (known[0], replace(known[1], order="text_first")),
    ),
    "the attention of the text": (
        "OpenAISignatureMMDITWrapper",
        lambda known: (*known, places.Place("joint_blocks.*.context_block.attn", "proj")),
    ),
    "a given image taken for the generated one": (
        EDITED,
        lambda known: (replace(known[0], order="text_first"),),
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_in_the_table_of_places_is_found(
    error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, change = ERRORS[error]
    kind = name.split()[0]
    monkeypatch.setitem(places.PLACES, kind, change(places.PLACES[kind]))
    with pytest.raises((AssertionError, ValueError)):
        check_tokens(observer(name), noise_for(name, 2))


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_groups_follow_a_permuted_batch(name: str, joined: bool) -> None:
    noise = noise_for(name, 4)
    run = {"joined": joined, "sigmas": (1.0, 0.5, 0.0), **given(name, 4)}
    for settings, order in (({}, [0, 2, 3, 1]), ({"reference": "others"}, [2, 0, 3, 1])):
        patcher = guided(model(name), **settings)
        results = sample(patcher, 4, noise=noise, **run)
        permuted = sample(patcher, 4, noise=noise[order], **run)
        torch.testing.assert_close(permuted, results[order], rtol=1e-3, atol=1e-3)
    texts = draw(2, TEXT, CHANNELS)[[0, 0, 1, 1]], draw(1, TEXT, CHANNELS, seed=1)
    patcher, order = guided(model(name)), [2, 3, 0, 1]
    results = sample(patcher, 4, noise=noise, texts=texts, **run)
    others = texts[0][order], texts[1]
    permuted = sample(patcher, 4, noise=noise[order], texts=others, **run)
    torch.testing.assert_close(permuted, results[order], rtol=1e-3, atol=1e-3)


WINDOWS = {(0.0, 0.2): [1.0, 0.9, 0.8], (0.35, 0.6): [0.6, 0.5, 0.4], (0.91, 1.0): []}


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", NAMES)
def test_the_forwards_that_differ_from_plain_ones_are_those_of_the_window(
    name: str, window: tuple[float, float], joined: bool
) -> None:
    """Each forward of the run is repeated without guidance, on the latents that it was given."""
    patcher = guided(model(name), start=window[0], end=window[1])
    sigmas = [i / 10 for i in range(10, -1, -1)]
    sample(patcher, 2, joined, noise=noise_for(name, 2), sigmas=sigmas, **given(name, 2))
    kept, different = list(patcher.model.kept), []
    for one in kept:
        plain = patcher.model.diffusion_model(one.x, one.context, {}, **one.given)
        if not torch.equal(plain, one.output):
            different.append(round(one.sigma, 3))
    assert len(kept) == (10 if joined else 20)
    assert different == [sigma for sigma in WINDOWS[window] for _ in range(1 if joined else 2)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["UNetModel", "Flux"])
def test_the_forwards_of_pictures_are_plain_and_as_many_as_the_guided_ones(
    name: str, window: tuple[float, float]
) -> None:
    patcher = model(name)
    pictures, settings = draw(1, 64, 96, 3).sigmoid(), {"start": window[0], "end": window[1]}
    (patcher,) = nodes.avoid_image(patcher, pictures, Vae(), **{**SETTINGS, **settings})
    sample(patcher, 2, noise=noise_for(name, 2), sigmas=[i / 10 for i in range(10, -1, -1)])
    kept, different = list(patcher.model.kept), []
    for one in kept:
        plain = patcher.model.diffusion_model(one.x, one.context, {})
        if not torch.equal(plain, one.output):
            different.append(round(one.sigma, 3))
    assert different == WINDOWS[window] and len(kept) == 10 + len(different)
