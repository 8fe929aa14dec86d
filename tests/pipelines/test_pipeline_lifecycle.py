"""apply_negtome and remove_negtome: what is refused, removal, errors inside of a run, copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
from helpers.pipelines_fixtures import (
    ALWAYS,
    built,
    denoiser,
    flux_pipeline,
    generate,
    hook_count,
    plain,
)
from negtome_fast.pipelines import (
    apply_negtome,
    negtome_guidance,
    remove_negtome,
)


def test_applying_twice_is_an_error_that_says_so(family: str) -> None:
    pipe = built(family)
    with negtome_guidance(pipe, ALWAYS):
        hooks = hook_count(pipe)
        for target in (pipe, denoiser(pipe)):
            with pytest.raises(ValueError, match="already applied"):
                apply_negtome(target, ALWAYS)
        assert hook_count(pipe) == hooks


def test_removing_is_allowed_at_any_time(flux: Any) -> None:
    remove_negtome(flux)
    handle = apply_negtome(flux, ALWAYS)
    assert handle.applied
    handle.remove()
    handle.remove()
    remove_negtome(flux)
    assert not handle.applied


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("placement", ["output", "pre_projection"])
def test_an_exception_inside_the_model_leaves_no_trace(
    family: str, placement: Any, error: type[BaseException]
) -> None:
    pipe = built(family)
    blocks = [m for m in denoiser(pipe).modules() if type(m).__name__ == "FeedForward"]

    def fail(*_: Any) -> None:
        raise error("stop")

    handle = apply_negtome(pipe, ALWAYS, placement=placement)
    hook = blocks[-1].register_forward_hook(fail)
    with pytest.raises(error, match="stop"):
        generate(pipe)
    hook.remove()
    guided = generate(pipe)
    assert torch.equal(guided[0], plain(family)[0])
    assert not torch.equal(guided[1], plain(family)[1])
    handle.remove()
    assert hook_count(pipe) == 0
    assert torch.equal(generate(pipe), plain(family))


def test_an_exception_in_the_callback_leaves_the_with_block_clean(sdxl: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), negtome_guidance(sdxl, ALWAYS):
        generate(sdxl, callback_on_step_end=fail)
    assert hook_count(sdxl) == 0
    assert torch.equal(generate(sdxl), plain("sdxl"))


def test_a_filter_that_matches_nothing_lists_the_blocks(flux: Any) -> None:
    with pytest.raises(ValueError, match=r"up_blocks.*single_transformer_blocks\.1\.attn"):
        apply_negtome(flux, blocks="up_blocks")


def test_an_unknown_setting_is_named(flux: Any) -> None:
    with pytest.raises(ValueError, match="'strength'"):
        apply_negtome(flux, strength=0.5)
    with pytest.raises(TypeError, match="NegToMeConfig, not dict"):
        apply_negtome(flux, {"alpha": 0.5})  # type: ignore[arg-type]


@pytest.mark.parametrize("thing", [None, "flux", 3, object()])
def test_what_is_no_pipeline_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match="transformer or a unet"):
        apply_negtome(thing)


def test_a_model_without_attention_is_refused() -> None:
    class Pipe:
        unet = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"Linear.*register_layout"):
        apply_negtome(Pipe())


def test_a_cache_is_refused_before_and_after() -> None:
    from diffusers import FirstBlockCacheConfig

    pipe = flux_pipeline()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="disable_cache"):
        apply_negtome(pipe)
    pipe.transformer.disable_cache()
    with negtome_guidance(pipe):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(ValueError, match="disable_cache"):
            generate(pipe)


def test_a_deep_copy_is_guided_and_removed_by_itself() -> None:
    pipe = flux_pipeline()
    apply_negtome(pipe, ALWAYS, steps=(0.0, 1.0), dropout=0.5)
    guided = generate(pipe)
    copied = copy.deepcopy(pipe)
    assert torch.equal(generate(copied), guided)
    remove_negtome(copied)
    assert hook_count(copied) == 0
    assert torch.equal(generate(copied), plain("flux"))
    assert torch.equal(generate(pipe), guided)


def test_a_guided_model_can_be_saved(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    pipe = flux_pipeline()
    apply_negtome(pipe, ALWAYS)
    pipe.transformer.save_pretrained(tmp_path)
    pipe.transformer = FluxTransformer2DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(generate(pipe), plain("flux"))


@pytest.mark.parametrize("placement", ["output", "pre_projection"])
def test_a_model_is_pickled_without_its_guidance(tmp_path: Path, placement: Any) -> None:
    pipe = flux_pipeline()
    apply_negtome(pipe, ALWAYS, placement=placement)
    guided = generate(pipe)
    torch.save(pipe.transformer, tmp_path / "model.pt")
    assert torch.equal(generate(pipe), guided)
    pipe.transformer = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(generate(pipe), plain("flux"))
    with negtome_guidance(pipe, ALWAYS, placement=placement):
        assert torch.equal(generate(pipe), guided)


def test_removing_finds_the_model_that_the_pipeline_held_before() -> None:
    pipe = flux_pipeline()
    guided = pipe.transformer
    handle = apply_negtome(pipe, ALWAYS)
    pipe.transformer = flux_pipeline().transformer
    remove_negtome(pipe)
    pipe.transformer = guided
    assert not handle.applied and hook_count(pipe) == 0
