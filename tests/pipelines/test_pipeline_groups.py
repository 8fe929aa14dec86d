"""Guidance groups of a batch: halves of classifier-free guidance, and several prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
from helpers.pipelines_fixtures import ALWAYS, TEXT, built, generate, plain
from negtome_fast.functional import negtome
from negtome_fast.pipelines import (
    negtome_guidance,
)


def test_each_half_of_a_guidance_batch_is_guided_by_itself(sdxl: Any) -> None:
    """Each half has its own reference, so both alone give what the whole gives."""

    def push(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([negtome(half, threshold=0.1) for half in output.chunk(2)])

    names = ("attn1", "attn2")
    blocks = [m for n, m in sdxl.unet.named_modules() if n.endswith(names) and "up_blocks" in n]
    hooks = [block.register_forward_hook(push) for block in blocks]
    expected = generate(sdxl, cfg=True)
    for hook in hooks:
        hook.remove()
    with negtome_guidance(sdxl, ALWAYS, blocks="up_blocks"):
        torch.testing.assert_close(generate(sdxl, cfg=True), expected)


def test_two_prompts_are_kept_apart_by_groups(flux: Any) -> None:
    with negtome_guidance(flux, ALWAYS, groups=2) as handle:
        guided = generate(flux)
    before = plain("flux")
    assert [torch.equal(guided[i], before[i]) for i in range(4)] == [True, False, True, False]
    assert handle.summary().groups == 2


def test_groups_that_do_not_divide_the_batch_are_an_error(flux: Any) -> None:
    with negtome_guidance(flux, ALWAYS, groups=3), pytest.raises(ValueError, match=r"3.*groups"):
        generate(flux)


def test_images_of_equal_seeds_are_not_taken_for_guidance_halves(sdxl: Any) -> None:
    with negtome_guidance(sdxl, ALWAYS) as handle:
        generate(sdxl, 2, equal_latents=True)
        assert handle.summary().groups == 1
        generate(sdxl, 2, equal_latents=True, cfg=True)
        assert handle.summary().groups == 2


def test_the_groups_are_found_anew_in_every_run(sdxl: Any) -> None:
    with negtome_guidance(sdxl, ALWAYS) as handle:
        for cfg, images, size in ((True, 2, (64, 64)), (False, 4, (64, 64)), (True, 2, (48, 64))):
            guided = generate(sdxl, images, size=size, cfg=cfg, steps=1)
            assert handle.summary().groups == (2 if cfg else 1)
            assert not torch.equal(guided[0], guided[1])


def test_a_bare_model_finds_the_groups_by_its_latents(sdxl: Any) -> None:
    with negtome_guidance(sdxl.unet, ALWAYS) as handle:
        assert torch.equal(generate(sdxl, cfg=True)[0], plain("sdxl", cfg=True)[0])
    assert handle.summary().groups == 2


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_up_to_three_guidance_parts_are_found(parts: int) -> None:
    """Three: perturbed-attention guidance, InstructPix2Pix."""
    unet = built("sd15").unet
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), negtome_guidance(unet, ALWAYS) as handle:
        unet(latents.repeat(parts, 1, 1, 1), 900, torch.ones(2 * parts, TEXT, 16))
    assert handle.summary().groups == parts


def test_another_pipeline_that_shares_the_model_finds_its_own_groups(sdxl: Any) -> None:
    other = type(sdxl).from_pipe(sdxl)
    other.set_progress_bar_config(disable=True)
    generate(sdxl, 2, steps=1)
    with negtome_guidance(sdxl, ALWAYS, steps=(0.0, 0.5)) as handle:
        generate(other, 2, steps=4, cfg=True)
        assert (handle.summary().groups, handle.summary().guided) == (2, 2)
        generate(sdxl, 2, steps=2, equal_latents=True)
        assert handle.summary().groups == 1
