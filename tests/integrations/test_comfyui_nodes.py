"""ComfyUI's own nodes and model classes with the NegToMe nodes: order, refusals, and the oracle.

Run where `COMFYUI_PATH` names a checkout of ComfyUI whose requirements this Python has.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import negtome_fast as nf
from helpers import comfyui_program
from helpers.comfyui_classes import EDITING, build, call, draw_latents
from helpers.comfyui_oracle import Run, check_tokens, handed
from negtome_fast.guidance import Guidance
from negtome_fast.integrations.comfyui import nodes
from negtome_fast.integrations.comfyui.guide import guides_of
from negtome_fast.integrations.comfyui.places import PLACES, hooked, image_grid

pytestmark = pytest.mark.skipif(
    "COMFYUI_PATH" not in os.environ,
    reason="needs ComfyUI: set COMFYUI_PATH to a checkout whose requirements this Python has",
)
SETTINGS = {"alpha": 0.9, "threshold": 0.0, "window": "percent", "start": 0.0, "end": 1.0}
SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "num_heads": 4,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 24,
    "legacy": False,
    "adm_in_channels": None,
    "use_linear_in_transformer": False,
    "use_temporal_attention": False,
}


def unet() -> Any:
    """A small UNet of SD 1.5's kind as ComfyUI's loaders return it."""
    comfyui_program.import_comfy()
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15(dict(SD15))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device="cpu")
    comfyui_program.randomise(model.diffusion_model)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def conditioning(seed: int, rows: int = 1, **more: Any) -> Any:
    draw = torch.Generator().manual_seed(seed)
    return [[torch.randn(rows, 5, 24, generator=draw), more]]


def sampled(model: Any, batch: int = 2, positive: Any = None, **settings: Any) -> torch.Tensor:
    import comfy.sample

    empty = torch.zeros(batch, 4, 16, 16)
    noise = settings.pop("noise", None)
    output: torch.Tensor = comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(empty, 11) if noise is None else noise,
        settings.pop("steps", 3),
        4.0,
        positive=positive or conditioning(0),
        negative=conditioning(1),
        latent_image=empty,
        **{
            "sampler_name": "euler",
            "scheduler": "normal",
            "disable_pbar": True,
            "seed": 11,
            **settings,
        },
    )
    return output


def diversity(model: Any, **settings: Any) -> Any:
    (guided,) = nodes.batch_diversity(model, **{**SETTINGS, "reference": "first", **settings})
    return guided


def node(module: str, name: str, model: Any, *values: Any) -> Any:
    """The model of one of ComfyUI's nodes, in either schema."""
    kind = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    if hasattr(kind, "execute"):
        made = kind.execute(model, *values)
        return getattr(made, "args", made)[0]
    return getattr(kind(), kind.FUNCTION)(model, *values)[0]


def hypertile(model: Any) -> Any:
    return node("nodes_hypertile", "HyperTile", model, 32, 2, 1, False)


def token_merging(model: Any) -> Any:
    return node("nodes_tomesd", "TomePatchModel", model, 0.5)


@pytest.mark.parametrize("patched", [hypertile, token_merging])
def test_nodes_that_change_tokens_go_before_negtome(patched: Callable[[Any], Any]) -> None:
    guided = diversity(patched(unet()))
    torch.manual_seed(0)
    plain = sampled(patched(unet()))
    torch.manual_seed(0)  # TomePatchModel draws from it
    moved = sampled(guided)
    torch.testing.assert_close(moved[0], plain[0])
    assert (moved[1] - plain[1]).abs().max() > 0.01
    with pytest.raises(ValueError, match="Put the NegToMe node after that node"):
        sampled(patched(diversity(unet())))


OTHERS = {
    "PerturbedAttentionGuidance": ("nodes_pag", 3.0),
    "SelfAttentionGuidance": ("nodes_sag", 0.5, 2.0),
    "FreeU_V2": ("nodes_freelunch", 1.3, 1.4, 0.9, 0.2),
    "PatchModelAddDownscale": ("nodes_model_downscale", 1, 2.0, 0.0, 0.35, True, "bicubic", "area"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("negtome_first", [True, False])
def test_other_nodes_of_comfyui_may_go_before_or_after(name: str, negtome_first: bool) -> None:
    module, *values = OTHERS[name]
    plain = sampled(node(module, name, unet(), *values))
    if negtome_first:
        moved = sampled(node(module, name, diversity(unet()), *values))
    else:
        moved = sampled(diversity(node(module, name, unet(), *values)))
    torch.testing.assert_close(moved[0], plain[0])
    assert (moved[1] - plain[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["EasyCacheNode", "LazyCacheNode"])
@pytest.mark.parametrize("negtome_first", [True, False])
def test_comfyuis_caches_are_refused_by_name(name: str, negtome_first: bool) -> None:
    def cache(model: Any) -> Any:
        return node("nodes_easycache", name, model, 0.2, 0.15, 0.95, False)

    model = cache(diversity(unet())) if negtome_first else diversity(cache(unet()))
    with pytest.raises(ValueError, match=f"{name[:4].lower()}cache, reuses outputs"):
        sampled(model)


@pytest.mark.parametrize("unit", ["percent", "sigma"])
@pytest.mark.parametrize(
    "run",
    [
        {"denoise": 0.5, "steps": 10},
        {"start_step": 4, "steps": 8},
        {"scheduler": "ddim_uniform", "steps": 4},
    ],
)
def test_a_run_that_never_reaches_the_window_is_told_what_would(
    unit: str, run: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    window = {"start": 0.0, "end": 0.2} if unit == "percent" else {"start": 14.7, "end": 6.0}
    guided = diversity(unet(), window=unit, **window)
    assert torch.equal(sampled(guided, **run), sampled(unet(), **run))
    (message,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    words = message.rsplit(" set ", 1)[1].split(", ")
    fitting = {name: float(value) for name, value in (word.split("=") for word in words[1:])}
    again = diversity(unet(), window=unit, **fitting)
    sampled(again, **run)
    (guide,) = guides_of(again)
    assert 1 <= guide.guidance.summary().guided <= 2


def test_images_of_a_batch_of_prompts_are_pushed_within_their_prompt() -> None:
    rows = conditioning(5, 2)[0][0][[0, 0, 1, 1]]
    plain, moved = (
        sampled(model, 4, [[rows, {}]], steps=2) for model in (unet(), diversity(unet()))
    )
    changed = [(a - b).abs().max() > 0.01 for a, b in zip(plain, moved, strict=True)]
    assert changed == [False, True, False, True]
    with pytest.raises(ValueError, match="set across_prompts"):
        sampled(diversity(unet()), 4, [[rows[[0, 2]], {}]])


def test_areas_are_parts_of_a_batch_and_windows_of_a_batch_are_refused() -> None:
    half = conditioning(2, area=(16, 8, 0, 0)) + conditioning(3, area=(16, 8, 0, 8))
    plain, moved = (sampled(model, 3, half, steps=2) for model in (unet(), diversity(unet())))
    torch.testing.assert_close(moved[0], plain[0])
    assert (moved[1:] - plain[1:]).abs().amax((1, 2, 3)).min() > 0.01
    model = diversity(unet())
    values: tuple[Any, ...] = (2, 0, "standard_static", 1, False, "pyramid", 0)
    module, name = "nodes_context_windows", "ContextWindowsManualNode"
    kind = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    if "freenoise" in inspect.signature(kind.execute).parameters:
        values = (*values, False)
    windows = node(module, name, model, *values)
    with pytest.raises(ValueError, match="where the run's 4 images make 8"):
        sampled(windows, 4)


def query_alone(monkeypatch: pytest.MonkeyPatch, kept: list[torch.Tensor]) -> None:
    """Makes every attention return its queries, so that tokens do not see each other."""

    def attention(q: torch.Tensor, *_: Any, skip_reshape: bool = False, **__: Any) -> torch.Tensor:
        output = q.transpose(1, 2).flatten(2) if skip_reshape else q
        kept.append(output.clone())
        return output

    for name, module in list(sys.modules.items()):
        for function in ("optimized_attention", "optimized_attention_masked"):
            if name.startswith("comfy.ldm") and hasattr(module, function):
                monkeypatch.setattr(module, function, attention)


@pytest.mark.parametrize(
    ("name", "editing"), [*((name, False) for name in PLACES), *((name, True) for name in EDITING)]
)
def test_the_tokens_that_move_with_the_latents_are_those_that_are_guided(
    name: str, editing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_tokens(observer(name, editing, monkeypatch), draw_latents(name, 2))


def observer(name: str, editing: bool, monkeypatch: pytest.MonkeyPatch) -> Run:
    model, kept = build(name), []
    query_alone(monkeypatch, kept)
    given = {"ref_latents": [draw_latents(name, 2)[..., :6, :8]]} if editing else {}

    def run(noise: torch.Tensor) -> tuple[list[torch.Tensor], list[Any]]:
        kept.clear()
        guidance = Guidance(nf.NegToMeConfig(alpha=0, threshold=-1.0, t_end=0))
        guidance.begin_step(900.0, grid=image_grid(model, noise)[1:])
        with (
            handed() as calls,
            hooked(model, noise, lambda tokens, block: guidance.apply(tokens, block=block)),
        ):
            call(model, noise, **given)
        guidance.end_step()
        return list(kept), calls

    return run
