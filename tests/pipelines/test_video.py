"""Peculiarities of videos: two denoisers, frames as items of a batch, given frames."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from helpers.families import FAMILIES
from helpers.families.core import LoopFamily, Part
from helpers.families.stepped import COSMOS, STABLE_VIDEO
from helpers.families.videos import FRAMES
from negtome_fast.config import NegToMeConfig
from negtome_fast.functional import negtome
from negtome_fast.pipelines import ImageTokens, negtome_guidance
from negtome_fast.pipelines.families.video import given_tokens, ltx_tokens, video_tokens

IMAGES = 3
ALWAYS = NegToMeConfig(threshold=0.1, t_end=0)
SIZE = (64, 96)
FRAME = 4 * 6


def generate(name: str, pipe: Any, images: int = 3, **settings: Any) -> Tensor:
    with torch.no_grad():
        return FAMILIES[name].generate(pipe, images, **{"steps": 1} | settings)


def wan_22() -> Any:
    """Return a pipeline of two denoisers: the second one goes on from timestep 700."""
    wan = FAMILIES["wan"]
    second = wan.denoiser.build()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.1)
    scheduler = Part(wan.scheduler.name, shift=1.0)
    return wan.build(boundary_ratio=0.7, transformer_2=second, scheduler=scheduler)


def test_both_denoisers_of_wan_22_are_guided_as_one() -> None:
    """The steps are 1000, 800, 600, 400 and 200. The second denoiser begins below 700."""
    pipe = wan_22()
    forwards: list[nn.Module] = []
    blocks: list[nn.Module] = []
    with ExitStack() as stack:
        handle = stack.enter_context(negtome_guidance(pipe, ALWAYS, t_start=900, t_end=500))
        for model in (pipe.transformer, pipe.transformer_2):
            stack.enter_context(
                model.register_forward_pre_hook(lambda module, args: forwards.append(module))
            )
        apply = handle.guidance.apply

        def recorded(tokens: Tensor, **settings: Any) -> Tensor:
            blocks.append(forwards[-1])
            return apply(tokens, **settings)

        handle.guidance.apply = recorded  # type: ignore[method-assign]
        guided = generate("wan", pipe, steps=5, cfg=True)
    before = generate("wan", pipe, steps=5, cfg=True)
    first, second = pipe.transformer, pipe.transformer_2
    assert forwards == [first] * 4 + [second] * 6
    # Two calls a step, four blocks a call: one guided step of each denoiser.
    assert [model for model in blocks if model is first] == [first] * 8
    assert [model for model in blocks if model is second] == [second] * 8
    assert torch.equal(guided[0], before[0]) and not torch.equal(guided[1], before[1])
    summary = handle.summary()
    assert (summary.forwards, summary.guided) == (10, 4)
    assert [row.block for row in summary.rows] == list(handle.blocks)
    assert {row.calls for row in summary.rows} == {4}


@pytest.mark.parametrize("boundary", [0.99, 0.01], ids=["first only", "second only"])
def test_the_window_decides_in_each_denoiser_of_wan_22(boundary: float) -> None:
    pipe = wan_22()
    pipe.register_to_config(boundary_ratio=boundary)
    with negtome_guidance(pipe, ALWAYS, t_start=700, t_end=500) as handle:
        generate("wan", pipe, steps=5)
    assert (handle.summary().forwards, handle.summary().guided) == (5, 1)


def pushed_by_hand(name: str, pipe: Any, blocks: list[nn.Module], push: Any) -> Tensor:
    """Run with `push` as a forward hook of these blocks."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block.register_forward_hook(push))
        return generate(name, pipe)


def modules(pipe: Any, *endings: str) -> list[nn.Module]:
    model = getattr(pipe, "transformer", None) or pipe.unet
    return [module for name, module in model.named_modules() if name.endswith(endings)]


def test_frames_of_one_video_are_matched_as_one_and_never_pushed_apart() -> None:
    """The items of a batch in Latte's blocks are the frames of all videos."""

    def push(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return negtome(output.reshape(3, -1, output.shape[2]), threshold=0.1).reshape(output.shape)

    pipe = FAMILIES["latte"].build()
    model = pipe.transformer
    blocks = [attn for block in model.transformer_blocks for attn in (block.attn1, block.attn2)]
    expected = pushed_by_hand("latte", pipe, blocks, push)
    with negtome_guidance(pipe, ALWAYS) as handle:
        torch.testing.assert_close(generate("latte", pipe), expected)
        assert handle.guidance.summary().rows[0].tokens == 2 * FRAMES * FRAME


def test_time_alone_is_left_out() -> None:
    for pipe in (FAMILIES["latte"].build(), FAMILIES["animatediff"].build()):
        with negtome_guidance(pipe, ALWAYS) as handle:
            assert not any("temporal" in name or "motion" in name for name in handle.blocks)


def test_the_given_frame_is_neither_moved_nor_matched() -> None:
    """The tokens of the input image come first in Wan 2.2 5B."""

    def push(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        generated = negtome(output[:, FRAME:], threshold=0.1)
        return torch.cat([output[:, :FRAME], generated], dim=1)

    name = "wan image-to-video by token"
    pipe = FAMILIES[name].build()
    expected = pushed_by_hand(name, pipe, modules(pipe, "attn1", "attn2"), push)
    with negtome_guidance(pipe, ALWAYS):
        torch.testing.assert_close(generate(name, pipe), expected)


def test_before_the_projection_the_text_of_cogvideox_is_left_alone() -> None:
    def push(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        text, video = args[0].split([5, FRAMES * FRAME], dim=1)
        return (torch.cat([text, negtome(video, threshold=0.1)], dim=1),)

    pipe = FAMILIES["cogvideox"].build()
    with ExitStack() as stack:
        for block in modules(pipe, "attn1.to_out.0"):
            stack.enter_context(block.register_forward_pre_hook(push))
        expected = generate("cogvideox", pipe)
    with negtome_guidance(pipe, ALWAYS, placement="pre_projection"):
        torch.testing.assert_close(generate("cogvideox", pipe), expected)


@pytest.mark.parametrize("name", ["wan", "hunyuan video", "mochi", "ltx 2", "latte", "animatediff"])
def test_before_the_projection_too_only_the_other_videos_change(name: str) -> None:
    pipe = FAMILIES[name].build()
    before = generate(name, pipe, steps=2)
    with negtome_guidance(pipe, ALWAYS, placement="pre_projection"):
        guided = generate(name, pipe, steps=2)
    assert torch.equal(guided[0], before[0])
    assert all(not torch.equal(guided[i], before[i]) for i in (1, 2))
    assert torch.equal(generate(name, pipe, steps=2), before)


def test_given_tokens_are_whole_frames_or_there_is_no_grid() -> None:
    assert video_tokens((3, 8, 12), (1, 2, 2), 24) == ImageTokens(72, 48, (4, 6), 2, offset=24)
    assert video_tokens((3, 8, 12), (1, 2, 2), 5) == ImageTokens(72, 67, None, 1, offset=5)


@pytest.mark.parametrize("given", [0, 6])
def test_coordinates_tell_the_grid_of_ltx(given: int) -> None:
    """The pipeline with conditions passes no sizes and puts the conditions before the video."""
    pipe = FAMILIES["ltx"].build()
    axes = (torch.arange(3.0) * 8, torch.arange(2.0) * 32, torch.arange(3.0) * 32)
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    places = torch.cat([torch.full((3, given), 7.0), places], dim=1)
    arguments = {
        "hidden_states": torch.zeros(2, 18 + given, 4),
        "timestep": torch.cat([torch.zeros(2, given), torch.full((2, 18), 900.0)], dim=1),
        "video_coords": places.expand(2, -1, -1),
    }
    expected = ImageTokens(18 + given, 18, (2, 3), 3, offset=given)
    assert ltx_tokens(pipe.transformer, arguments) == expected


def test_what_ltx_2_appends_is_not_generated() -> None:
    pipe = FAMILIES["ltx"].build()
    arguments = {
        "hidden_states": torch.zeros(2, 24, 4),
        "timestep": torch.tensor([[0.0] * 6 + [900.0] * 12 + [0.0] * 6] * 2),
        "num_frames": 3,
        "height": 2,
        "width": 3,
    }
    expected = ImageTokens(24, 12, (2, 3), 2, offset=6)
    assert ltx_tokens(pipe.transformer, arguments) == expected


@pytest.mark.parametrize("shape", [(2, 3), (2, 12), (2, 1, 3, 1, 1), (2, 1, 3, 2, 2)], ids=str)
def test_times_of_frames_and_of_tokens_tell_what_is_given(shape: tuple[int, ...]) -> None:
    """The first of three frames with four tokens each is given."""
    times = torch.full(shape, 900.0)
    times.reshape(2, 3, -1)[:, 0] = 0
    assert given_tokens(times, 12) == 4
    assert given_tokens(torch.full(shape, 900.0), 12) == 0


@pytest.mark.parametrize("timestep", [torch.zeros(2), torch.full((2, 1), 900.0), 900, None])
def test_one_time_for_all_gives_nothing_away(timestep: Any) -> None:
    assert given_tokens(timestep, 12) == 0


@pytest.mark.parametrize("family", [STABLE_VIDEO, COSMOS], ids=["svd", "cosmos"])
def test_without_timesteps_the_window_is_in_steps(family: LoopFamily) -> None:
    """Stable Video Diffusion and Cosmos are given logarithms of the noise as timesteps."""
    pipe, groups = family.build(), 2 if family.cfg else 1

    def run() -> Tensor:
        with torch.no_grad():
            return family.generate(pipe, IMAGES, steps=4, cfg=family.cfg)

    before = run()
    expected = r"does not count .* use a share .* steps=\(0"
    with negtome_guidance(pipe, ALWAYS), pytest.raises(ValueError, match=expected):
        run()
    with negtome_guidance(pipe, ALWAYS, steps=(0.25, 0.75)) as handle:
        guided = run()
    summary = handle.summary()
    assert (summary.forwards, summary.guided, summary.groups) == (4, 2, groups)
    for row in summary.rows:
        assert row.grid is not None
        frames = family.frames
        assert row.tokens == 2 * groups * (IMAGES - 1) * frames * row.grid[0] * row.grid[1]
    assert {row.grid for row in summary.rows} == family.grids[SIZE]
    assert torch.equal(guided[0], before[0])
    assert all(not torch.equal(guided[i], before[i]) for i in (1, 2))
    assert torch.equal(run(), before)
