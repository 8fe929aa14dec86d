"""The authors' pipelines: their placement against an emulation of it, defaults and arguments."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
from diffusers import FluxPipeline, StableDiffusionXLPipeline

from helpers.compat_emulation import (
    ARGS,
    Emulation,
    agree,
    flux,
    recorded,
    sdxl,
)
from helpers.pipelines_fixtures import TEXT, generate
from negtome_fast.compat import (
    NegtomeArgs,
    update_args,
)


@pytest.mark.parametrize(
    ("given", "emulated"),
    [
        ({}, {}),
        ({"merging_alpha": 1.75, "merging_threshold": 0.5}, {"alpha": 1.75, "threshold": 0.5}),
        ({"merging_t_start": 900, "merging_t_end": 600}, {"window": (900, 600)}),
        ({"num_joint_blocks": 1}, {"joint": 1}),
        ({"num_single_blocks": 1, "num_joint_blocks": 0}, {"single": 1, "joint": 0}),
        ({"num_joint_blocks": 99}, {}),
    ],
    ids=str,
)
def test_flux_attention_agrees_with_their_placement(
    double: None, given: dict[str, Any], emulated: dict[str, Any]
) -> None:
    pipe, run = flux(), {"steps": 3, "size": (64, 96)}
    with recorded(pipe.transformer) as plain:
        generate(pipe, **run)
    with recorded(pipe.transformer) as ours:
        images = generate(pipe, **run, use_negtome=True, negtome_args={**ARGS, **given})
    with recorded(pipe.transformer) as theirs, Emulation(pipe.transformer, **emulated):
        expected = generate(pipe, **run)
    agree(ours, theirs)
    torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-9)
    last = "single_transformer_blocks.1.attn"
    assert not torch.allclose(ours[last][-1], plain[last][-1], atol=1e-3)


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no cfg"])
@pytest.mark.parametrize(
    ("given", "emulated"),
    [
        ({}, {}),
        ({"blocks": ["down_blocks.1", "mid_block"], "min_attn_dim": 1}, {}),
        ({"merging_t_end": 500}, {"window": (1000, 500)}),
    ],
    ids=str,
)
def test_sdxl_attention_agrees_with_their_placement(
    double: None, given: dict[str, Any], emulated: dict[str, Any], cfg: bool
) -> None:
    """Each half by itself, also without guidance, where theirs has halves all the same."""
    pipe, run = sdxl(), {"steps": 3, "size": (64, 96), "cfg": cfg}
    given = {"min_attn_dim": 8, **given}  # of grids of 8 x 12 and 4 x 6
    emulated = {"min_attn_dim": given["min_attn_dim"], **emulated}
    emulated["blocks"] = tuple(given.get("blocks", ["up_blocks"]))
    with recorded(pipe.unet) as plain:
        generate(pipe, **run)
    with recorded(pipe.unet) as ours:
        images = generate(pipe, **run, use_negtome=True, negtome_args={**ARGS, **given})
    with recorded(pipe.unet) as theirs, Emulation(pipe.unet, **emulated):
        expected = generate(pipe, **run)
    agree(ours, theirs)
    torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-9)
    assert any(not torch.allclose(ours[n][-1], plain[n][-1], atol=1e-3) for n in ours)


@pytest.mark.parametrize("make", [flux, sdxl])
def test_without_use_negtome_it_is_diffusers_pipeline(make: Any) -> None:
    pipe = make()
    base = FluxPipeline if make is flux else StableDiffusionXLPipeline
    extra = {} if make is flux else {"add_watermarker": False}
    plain = base(**pipe.components, **extra)
    plain.set_progress_bar_config(disable=True)
    expected = generate(plain)
    assert torch.equal(generate(pipe, negtome_args={"use_negtome": True, **ARGS}), expected)
    low = {} if make is flux else {"min_attn_dim": 8}
    guided = generate(pipe, use_negtome=True, negtome_args={"use_negtome": False, **ARGS, **low})
    assert not torch.equal(guided[1], expected[1])
    assert torch.equal(generate(pipe), expected)


def test_paper_matching_is_one_argument_away() -> None:
    pipe, results = flux(), {}
    for matching in ("official", "paper"):
        arguments = NegtomeArgs(merging_t_end=0, merging_threshold=0.3, matching=matching)  # type: ignore[arg-type]
        results[matching] = generate(pipe, use_negtome=True, negtome_args=arguments)
        assert pipe.negtome_summary is not None and pipe.negtome_summary.total.pushed > 0
    assert not torch.equal(results["official"][1], results["paper"][1])
    assert torch.equal(results["official"][0], results["paper"][0])


def test_defaults_are_those_of_the_two_pipelines() -> None:
    seen = []
    for pipe in (flux(), sdxl()):

        def config(*args: Any, pipe: Any = pipe, **kwargs: Any) -> Any:
            from negtome_fast.pipelines.hooks import find_hooks

            model = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
            seen.append(find_hooks(model).guidance.config)
            return kwargs or args[3]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these grids are smaller than 32 x 32
            generate(pipe, steps=1, use_negtome=True, callback_on_step_end=config)
    for c, (threshold, end) in zip(seen, ((0.65, 900), (0.7, 800)), strict=True):
        assert (c.alpha, c.threshold, c.dropout, c.t_start, c.t_end) == (
            0.9,
            threshold,
            0.0,
            1000,
            end,
        )
        assert (c.matching, c.reference) == ("official", "first")
    assert seen[0].min_grid is None and seen[0].placement == "pre_projection"
    assert seen[1].min_grid == (32, 32) and seen[1].placement == "output"
    assert {"merging_alpha", "rag_assets"} <= set(vars(NegtomeArgs()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"merging_alhpa": 1.0},
            r"no key 'merging_alhpa' \(did you mean 'merging_alpha'\?\).*noise",
        ),
        ({"alpha": 1.0, "beta": 2}, "'alpha', 'beta'"),
        ({"use_rag_assets": True}, r"rag_assets=\[\(image, mask\)\]"),
        ({"num_lang_tokens": 77}, "77, but the prompt has 5 tokens"),
        ({"merging_threshold": 7}, "threshold"),
    ],
)
@pytest.mark.parametrize("use_negtome", [True, False])
def test_bad_arguments_are_one_clear_error(
    arguments: dict[str, Any], message: str, use_negtome: bool
) -> None:
    if "merging_threshold" in arguments and not use_negtome:
        return
    with pytest.raises(ValueError, match=message):
        generate(flux(), use_negtome=use_negtome, negtome_args=arguments)
    with pytest.raises(TypeError, match="dict or NegtomeArgs, not list"):
        generate(flux(), negtome_args=[("merging_alpha", 1)])


def test_keys_of_the_other_pipeline_are_told() -> None:
    with pytest.warns(UserWarning, match="FluxNegToMePipeline has no use for blocks"):
        generate(flux(), steps=1, negtome_args={"blocks": ["up_blocks"]})
    assert update_args(NegtomeArgs(), {"merging_alpha": 2.0}).merging_alpha == 2.0


def test_window_is_compared_in_the_dtype_of_the_latents() -> None:
    """Their FLUX.1 code sees 899 as 900 in bf16, and 899.99994 as outside in fp32."""
    from negtome_fast.compat.arguments import AuthorsConfig

    config = AuthorsConfig(t_end=900)
    half = AuthorsConfig(t_end=900, time_dtype=torch.bfloat16)
    assert [c.includes_step(899.0) for c in (config, half)] == [False, True]
    assert [c.includes_step(899.99994) for c in (config, half)] == [False, True]
    assert [c.includes_step(897.9) for c in (config, half)] == [False, False]
    assert config.includes_step(900.0)


def test_several_prompts_have_the_first_image_as_reference(double: None) -> None:
    """One reference for the whole batch, whichever prompt an image has."""
    pipe = flux()
    prompts = torch.randn(2, TEXT, 16, generator=torch.Generator().manual_seed(1))
    prompts = prompts.repeat_interleave(2, dim=0)
    call = {
        "prompt_embeds": prompts,
        "pooled_prompt_embeds": prompts[:, 0],
        "height": 64,
        "width": 64,
        "num_inference_steps": 2,
        "output_type": "latent",
    }

    def latents() -> Tensor:
        return torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(2))

    with torch.no_grad():
        plain = pipe(**call, latents=latents()).images
        ours = pipe(**call, latents=latents(), use_negtome=True, negtome_args=ARGS).images
        with Emulation(pipe.transformer):
            theirs = pipe(**call, latents=latents()).images
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert torch.equal(ours[0], plain[0])
    assert all(not torch.equal(ours[i], plain[i]) for i in (1, 2, 3))


def test_guidance_scale_has_their_default_and_positions_are_diffusers() -> None:
    pipe, text = flux(), torch.zeros(2, TEXT, 16)
    embeds = {"prompt_embeds": text, "pooled_prompt_embeds": text[:, 0], "output_type": "latent"}
    with torch.no_grad():
        pipe(height=32, width=32, num_inference_steps=1, **embeds)
        assert pipe.guidance_scale == 7.0
        pipe(None, None, None, None, 1.0, 32, 32, 1, None, 2.5, **embeds)
        assert pipe.guidance_scale == 2.5
    with pytest.raises(TypeError, match="unexpected keyword argument 'heigth'"):
        pipe(heigth=32, **embeds)
