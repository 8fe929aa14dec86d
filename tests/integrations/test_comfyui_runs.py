"""Runs in which the ComfyUI nodes would guide nothing, or not what the settings say: one warning a
run, or an error that says what to do."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers import comfyui_nodes as others
from helpers.comfyui_double import (
    CHANNELS,
    SIGMAS,
    TEXT,
    BaseModel,
    ModelPatcher,
    UNetModel,
    draw,
    sample,
)
from helpers.comfyui_guided import avoid, by_kind, diversity, model, summary
from negtome_fast.integrations.comfyui import nodes
from negtome_fast.integrations.comfyui.guide import guides_of

DEFAULT_WINDOW = {"start": 0.0, "end": 0.2}
LATER_HALF = tuple(0.5 - i / 20 for i in range(11))


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings in ComfyUI's log so far; they are taken out of it."""
    messages = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    caplog.clear()
    return messages


SCHEDULES = {
    "a second pass with denoise 0.5": (LATER_HALF, "begins at sigma 0.5, percent 0.5"),
    "a sampler that continues from step 3": (SIGMAS[2:], "begins at sigma 0.5, percent 0.5"),
    "four leading-spaced steps": ((0.751, 0.501, 0.251, 0.001, 0.0), "sigma 0.751, percent 0.249"),
    "steps around the window": ((1.0, 0.7, 0.3, 0.0), "begins at sigma 1, percent 0"),
}


@by_kind
@pytest.mark.parametrize("unit", ["percent", "sigma"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_without_a_step_in_the_window_is_told_with_a_window_that_works(
    kind: str, unit: str, schedule: str, caplog: pytest.LogCaptureFixture
) -> None:
    patcher, (sigmas, begins) = model(kind), SCHEDULES[schedule]
    narrow = {"start": 0.1, "end": 0.2} if sigmas[0] == 1 else DEFAULT_WINDOW
    if unit == "sigma":
        narrow = {"start": 1 - narrow["start"], "end": 1 - narrow["end"]}
    guided = diversity(patcher, window=unit, **narrow)
    assert torch.equal(sample(guided, 2, sigmas=sigmas), sample(patcher, 2, sigmas=sigmas))
    (message,) = told(caplog)
    assert "not guided: no step of this run lies in the window" in message and begins in message
    assert "not guided" in nodes.info(guided, None)[1]

    words = message.rsplit(" set ", 1)[1].split(", ")
    assert words[0] == f"window={unit}"
    fitting = {name: float(value) for name, value in (word.split("=") for word in words[1:])}
    again = diversity(patcher, window=unit, **fitting)
    sample(again, 2, sigmas=sigmas)
    steps = len(sigmas) - 1
    assert summary(again).guided == max(1, round(steps / 5))
    assert told(caplog) == [] and "not guided" not in nodes.info(again, None)[1]
    sample(guided, 2, sigmas=sigmas)
    assert len(told(caplog)) == 1  # each run is told of


def test_a_run_is_told_of_before_it_begins(caplog: pytest.LogCaptureFixture) -> None:
    guided = diversity(model("Flux"), **DEFAULT_WINDOW)
    before: list[int] = []

    def wrapper(model_function: Any, given: dict[str, Any]) -> Any:
        before.append(len(caplog.records))
        return model_function(given["input"], given["timestep"], **given["c"])

    guided.set_model_unet_function_wrapper(wrapper)
    sample(guided, 2, sigmas=LATER_HALF)
    assert before == [1] * 10


def test_forwards_between_the_steps_count(caplog: pytest.LogCaptureFixture) -> None:
    """A sampler of second order also runs the model where its schedule has no step."""
    patcher = diversity(model("UNetModel"), start=0.1, end=0.2)

    def second_order(executor: Any, x: torch.Tensor, sigma: Any, options: Any) -> Any:
        executor(x, sigma * 0.85, options)
        return executor(x, sigma, options)

    patcher.add_wrapper_with_key("predict_noise", "second order", second_order)
    sample(patcher, 2, sigmas=(1.0, 0.5, 0.0))
    assert told(caplog) == [] and summary(patcher).guided == 1


@by_kind
def test_a_batch_of_one_is_told_what_works(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    patcher = model(kind)
    guided = diversity(patcher)
    assert torch.equal(sample(guided, 1), sample(patcher, 1))
    (message,) = told(caplog)
    assert "not guided: the batch has one image" in message
    assert "batch_size" in message and "NegToMe (avoid image)" in message
    assert "others" not in message
    assert (summary(guided).guided, summary(guided).forwards) == (0, 4)
    patcher.model.forwards.clear()
    with pytest.raises(ValueError, match=r"one image. Set batch_size .*NegToMe \(avoid image\)"):
        sample(diversity(patcher, reference="others"), 1)
    assert patcher.model.forwards == []  # refused before the run
    sample(avoid(patcher), 1)
    assert told(caplog) == []


@by_kind
def test_equal_images_in_a_batch_are_told(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    noise = draw(4, 4, 8, 12)
    noise[2], noise[3] = noise[0], noise[1]
    guided = diversity(model(kind))
    sample(guided, 4, noise=noise)
    messages = told(caplog)
    assert len(messages) == 2
    assert "images 1 and 3 of the batch begin with the same noise" in messages[0]
    assert "images 2 and 4" in messages[1] and "Latent Batch Seed Behavior" in messages[1]
    assert "came out equal" in nodes.info(guided, None)[1]
    sample(diversity(model(kind)), 4)
    texts = draw(4, TEXT, CHANNELS), draw(1, TEXT, CHANNELS, seed=1)
    sample(diversity(model(kind), across_prompts=True), 4, noise=noise, texts=texts)
    assert told(caplog) == []  # the same noise with different prompts is no mistake


def test_equal_latents_without_added_noise_are_told(caplog: pytest.LogCaptureFixture) -> None:
    repeated, silence = draw(1, 4, 8, 12).expand(2, -1, -1, -1), torch.zeros(2, 4, 8, 12)
    late = {"noise": silence, "sigmas": LATER_HALF}
    sample(diversity(model("Flux")), 2, latents=repeated, **late)
    (message,) = told(caplog)
    assert "images 1 and 2 of the batch" in message and "came out equal" in message
    sample(diversity(model("Flux")), 2, latents=draw(2, 4, 8, 12), **late)
    assert told(caplog) == []


def test_alpha_0_is_said_to_measure_only() -> None:
    guided = diversity(model("Flux"), alpha=0.0)
    sample(guided, 2)
    assert "measured only: alpha is 0" in nodes.info(guided, None)[1]


PROMPTS = {"a, a, b, b": [0, 0, 1, 1], "a, b, a, b": [0, 1], "a, b, c, d": [0, 1, 2, 3]}


def prompts(numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(4, TEXT, CHANNELS, seed=3)[numbers], draw(1, TEXT, CHANNELS, seed=4)


@by_kind
@pytest.mark.parametrize("joined", [True, False])
def test_images_are_pushed_within_their_prompt(kind: str, joined: bool) -> None:
    patcher, texts, noise = model(kind), prompts([0, 0, 1, 1]), draw(4, 4, 8, 12, seed=2)
    plain = sample(patcher, 4, joined, noise=noise, texts=texts)
    moved = sample(diversity(patcher), 4, joined, noise=noise, texts=texts)
    changed = [not torch.equal(*pair) for pair in zip(plain, moved, strict=True)]
    assert changed == [False, True, False, True]
    alone = [
        sample(diversity(patcher), 2, joined, noise=noise[i : i + 2], texts=prompts([i // 2] * 2))
        for i in (0, 2)
    ]
    torch.testing.assert_close(moved, torch.cat(alone))
    together = diversity(patcher, across_prompts=True)
    moved = sample(together, 4, joined, noise=noise, texts=texts)
    changed = [not torch.equal(*pair) for pair in zip(plain, moved, strict=True)]
    assert changed == [False, True, True, True]


@pytest.mark.parametrize("order", ["a, b, a, b", "a, b, c, d"])
def test_prompts_that_make_no_groups_are_refused(order: str) -> None:
    patcher, texts = model("Flux"), prompts(PROMPTS[order])
    with pytest.raises(ValueError, match=r"have the prompts 1, 2, .*set across_prompts"):
        sample(diversity(patcher), 4, texts=texts)
    sample(diversity(patcher, across_prompts=True), 4, texts=texts)


@by_kind
@pytest.mark.parametrize("order", PROMPTS)
def test_references_are_in_the_prompt_of_each_image(kind: str, order: str) -> None:
    """An image of a batch comes out as it does alone, where its prompt is the only one."""
    patcher, noise, numbers = model(kind), draw(4, 4, 8, 12, seed=2), PROMPTS[order]
    together = sample(avoid(patcher, 2), 4, noise=noise, texts=prompts(numbers))
    for i in range(4):
        text = prompts([numbers[i % len(numbers)]])
        alone = sample(avoid(patcher, 2), 1, noise=noise[i : i + 1], texts=text)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


MERGED = {"HyperTile": others.hypertile, "ToMe": others.token_merging}


@pytest.mark.parametrize("name", MERGED)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_node_that_changes_the_tokens_of_attention_goes_first(name: str, batch: int) -> None:
    patcher, merged = model("UNetModel"), MERGED[name](model("UNetModel"))
    guided = diversity if batch > 1 else avoid
    plain, moved = sample(merged, batch), sample(guided(merged), batch)
    unchanged = [torch.equal(*pair) for pair in zip(plain, moved, strict=True)]
    assert unchanged == ([True, False, False] if batch > 1 else [False])
    with pytest.raises(ValueError, match=rf"\({'HyperTile, ToMe'}\). Put the NegToMe node after"):
        sample(MERGED[name](guided(patcher)), batch)


def test_a_mask_with_merged_tokens_names_the_order() -> None:
    mask = torch.zeros(1, 40, 56)
    mask[..., :28] = 1
    assert sample(avoid(others.token_merging(model("UNetModel")), mask=mask), 1).isfinite().all()
    with pytest.raises(ValueError, match="Put the NegToMe node after that node"):
        sample(others.token_merging(avoid(model("UNetModel"), mask=mask)), 1)


def test_a_unet_that_names_no_grid_of_its_blocks_is_checked_as_well() -> None:
    patcher = ModelPatcher(BaseModel(UNetModel(levels=2)))

    def forget(tokens: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        options.pop("activations_shape", None)
        return tokens

    patcher.set_model_attn1_output_patch(forget)
    guided = diversity(patcher)
    sample(guided, 2)
    grids = [row.grid for row in summary(guided).rows]
    assert grids == [(8, 12), (8, 12), (4, 6), (4, 6)]
    patcher = model("UNetModel")
    patcher.set_model_attn1_output_patch(forget)
    patcher.set_model_attn1_patch(lambda q, k, v, options: (q[:, 1:], k, v))
    with pytest.raises(ValueError, match="95 tokens each, where the latents make 4 with"):
        sample(diversity(patcher), 2)


@by_kind
def test_tiles_in_the_batch_of_a_forward_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"batch of 8, where the run's 2 images make 4"):
        sample(others.tiled_diffusion(diversity(model(kind))), 2)


def test_added_items_inside_of_the_model_are_refused() -> None:
    patcher = model("Flux")
    others.negative_attention(patcher.model.diffusion_model)
    plain = sample(patcher, 1)
    with pytest.raises(ValueError, match="has a batch of 8 where the latents have 4"):
        sample(diversity(patcher), 2)
    assert torch.equal(sample(patcher, 1), plain)


@by_kind
@pytest.mark.parametrize("key", ["lazycache", "easycache"])
@pytest.mark.parametrize("node_first", [True, False])
def test_caches_are_refused_by_name(kind: str, key: str, node_first: bool) -> None:
    patcher = model(kind)
    if node_first:
        cached = diversity(others.lazy_cache(patcher, key))
    else:
        cached = others.lazy_cache(diversity(patcher), key)
    with pytest.raises(ValueError, match=f"{key}, reuses outputs of earlier steps"):
        sample(cached, 2)
    assert patcher.model.forwards == []


def test_caches_of_node_packs_are_refused_by_name() -> None:
    def wrapper(model_function: Any, given: dict[str, Any]) -> Any:
        raise AssertionError("the run was refused before")

    wrapper.__module__ = "/home/some.cache/ComfyUI/custom_nodes/ComfyUI-TeaCache.nodes"
    cached = diversity(model("Flux"))
    cached.set_model_unet_function_wrapper(wrapper)
    with pytest.raises(ValueError, match=r"this model, ComfyUI-TeaCache.nodes.*, reuses outputs"):
        sample(cached, 2)
    options = diversity(model("Flux"))
    options.model_options["transformer_options"]["enable_magcache"] = True
    with pytest.raises(ValueError, match="enable_magcache, reuses outputs"):
        sample(options, 2)
    harmless = diversity(model("Flux"))

    def same(model_function: Any, given: dict[str, Any]) -> Any:
        return model_function(given["input"], given["timestep"], **given["c"])

    same.__qualname__ = "Other.patch.<locals>.same"
    same.__module__ = "/home/some.cache/ComfyUI/custom_nodes/ComfyUI-Other.nodes"
    harmless.set_model_unet_function_wrapper(same)
    assert torch.equal(sample(harmless, 2), sample(diversity(model("Flux")), 2))


@by_kind
def test_an_unknown_cache_is_refused_when_it_skips_blocks(kind: str) -> None:
    """Refused inside of the window, and after it, where guided outputs would be reused."""
    patcher = model(kind)
    for window in ({}, {"end": 0.1}):
        with pytest.raises(ValueError, match=r"at sigma 0.75 the model ran 0 of 2 attention modul"):
            sample(others.skipping(diversity(patcher, **window)), 2)
    sample(others.skipping(diversity(patcher, start=0.7), first=9), 2)
    modules = patcher.model.diffusion_model.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_steps_without_a_forward_are_told(caplog: pytest.LogCaptureFixture) -> None:
    cached = others.lazy_cache(diversity(model("Flux")), "unknown")
    sample(cached, 2)
    (message,) = told(caplog)
    assert "in 2 of the 4 steps in the window the model did not run" in message


def test_a_replaced_model_is_told(caplog: pytest.LogCaptureFixture) -> None:
    patcher = diversity(model("Flux"))
    flux = patcher.model.diffusion_model
    flux.forward = lambda x, context, options: torch.zeros_like(x)
    sample(patcher, 2)
    (message,) = told(caplog)
    assert "not guided: no attention module of the model ran in the window" in message


def test_warnings_of_the_guidance_are_told_in_each_run(caplog: pytest.LogCaptureFixture) -> None:
    guided = diversity(model("Flux"))
    (guide,) = guides_of(guided)

    def wrapper(model_function: Any, given: dict[str, Any]) -> Any:
        guide.guidance._warn("something that the nodes have no words for")
        return model_function(given["input"], given["timestep"], **given["c"])

    guided.set_model_unet_function_wrapper(wrapper)
    for _ in range(2):
        sample(guided, 2)
        (message,) = told(caplog)
        assert message.endswith("something that the nodes have no words for")


def test_a_tensor_that_another_hook_keeps_is_not_written_into() -> None:
    patcher, kept = model("Flux"), []
    flux = patcher.model.diffusion_model
    flux.double_blocks[0].img_attn.proj.register_forward_hook(
        lambda module, given, output: kept.append((output, output.clone()))
    )
    flux.single_blocks[0].linear2.register_forward_pre_hook(
        lambda module, given: kept.append((given[0], given[0].clone()))
    )
    moved = sample(diversity(patcher), 2)
    assert len(kept) == 8 and all(torch.equal(*pair) for pair in kept)
    assert torch.equal(moved, sample(diversity(model("Flux")), 2))


def test_compiled_parts_are_refused() -> None:
    in_place = model("Flux")
    in_place.model.diffusion_model.double_blocks[0].compile(backend="eager")
    objects = diversity(model("Flux"))
    compiled = torch.compile(objects.model.diffusion_model.single_blocks[0], backend="eager")
    objects.object_patches["diffusion_model.single_blocks.0"] = compiled
    for patcher in (diversity(in_place), objects):
        with pytest.raises(ValueError, match="compiled by a node"):
            sample(patcher, 2)


def test_a_model_that_runs_outside_of_a_run_is_refused() -> None:
    guided = diversity(model("Flux"))
    sample(guided, 2)
    executor = SimpleNamespace(class_obj=guided.model)
    (guide,) = guides_of(guided)
    with pytest.raises(ValueError, match="without the wrappers of a run"):
        guide.forward(executor, draw(2, 4, 8, 12), torch.ones(2))
