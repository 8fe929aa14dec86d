"""All families of `helpers.families` are guided, as whole pipelines where they run offline."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from docs.render import families
from helpers.families import FAMILIES
from helpers.families.core import TEXT, denoiser, embeddings, noise
from negtome_fast.config import NegToMeConfig
from negtome_fast.functional import negtome
from negtome_fast.pipelines import (
    apply_negtome,
    known_layouts,
    layouts,
    negtome_guidance,
    register_layout,
)

IMAGES = 3
EVERY_TOKEN = NegToMeConfig(threshold=-1, t_end=0, groups=1)
"""Settings that push every token, except those of the reference image.

Captions of several lengths are several prompts, whose images `groups=1` guides together.
"""


@functools.cache
def built(name: str) -> Any:
    return FAMILIES[name].build()


def generate(name: str, **settings: Any) -> Tensor:
    family = FAMILIES[name]
    with torch.no_grad():
        return family.generate(built(name), IMAGES, **{"captions": family.captions()} | settings)


@functools.cache
def plain(name: str, cfg: bool) -> Tensor:
    return generate(name, cfg=cfg)


def hook_count(model: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(m, name)) for m in model.modules() for name in names)


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    assert hook_count(denoiser(built(request.param))) == 0


def with_and_without_cfg(name: str) -> tuple[bool, ...]:
    return (False, True) if FAMILIES[name].cfg else (False,)


def test_the_other_images_are_guided_and_removal_restores(name: str) -> None:
    model = denoiser(built(name))
    for cfg in with_and_without_cfg(name):
        before = plain(name, cfg)
        handle = apply_negtome(built(name), EVERY_TOKEN)
        with recorded_batches(model) as batches:
            guided = generate(name, cfg=cfg)
        handle.remove()
        assert torch.equal(guided[0], before[0])
        assert all(not torch.equal(guided[i], before[i]) for i in range(1, IMAGES))
        assert hook_count(model) == 0
        assert torch.equal(generate(name, cfg=cfg), before)
        summary = handle.summary()
        # The batch size tells how the pipeline does classifier-free guidance.
        assert set(batches) == {IMAGES * summary.groups}
        assert len(batches) * summary.groups == (4 if cfg else 2)
        assert summary.guided == summary.forwards == len(batches)
        assert sorted(row.block for row in summary.rows) == sorted(handle.blocks)


@contextmanager
def recorded_batches(model: nn.Module) -> Iterator[list[int]]:
    """Yield a list of the batch size of each forward."""
    batches: list[int] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        batched = [v for v in given if isinstance(v, list) or getattr(v, "ndim", 0) > 2]
        batches.append(len(batched[0]))

    with model.register_forward_pre_hook(record, with_kwargs=True):
        yield batches


def test_alpha_zero_and_a_window_elsewhere_are_bit_identical(name: str) -> None:
    cfg = FAMILIES[name].cfg
    with negtome_guidance(built(name), EVERY_TOKEN, alpha=0) as handle:
        assert torch.equal(generate(name, cfg=cfg), plain(name, cfg))
    assert handle.summary().total.matched > 0.99
    with negtome_guidance(built(name), EVERY_TOKEN, t_start=0.5, t_end=0.1) as handle:
        assert torch.equal(generate(name, cfg=cfg), plain(name, cfg))
    assert handle.summary().guided == 0 < handle.summary().forwards


def test_the_time_that_the_model_is_given_is_read_in_timesteps(name: str) -> None:
    """A bare model knows no scheduler. A window around one timestep hits that step alone."""
    pipe = built(name)
    generate(name, steps=2)
    for timestep in map(FAMILIES[name].timesteps, pipe.scheduler.timesteps[:2].tolist()):
        window = {"t_start": min(timestep + 2, 1000), "t_end": max(timestep - 2, 0)}
        with negtome_guidance(denoiser(pipe), EVERY_TOKEN, groups=1, **window) as handle:
            generate(name, steps=2)
        assert (handle.summary().guided, handle.summary().forwards) == (1, 2), timestep
    with negtome_guidance(pipe, EVERY_TOKEN, steps=(0.0, 0.5)) as handle:
        generate(name, steps=2)
    assert (handle.summary().guided, handle.summary().forwards) == (1, 2)


def test_before_the_projection_as_many_tokens_are_guided(name: str) -> None:
    with negtome_guidance(built(name), EVERY_TOKEN) as after:
        generate(name, steps=1)
    before = plain(name, False)
    with negtome_guidance(built(name), EVERY_TOKEN, placement="pre_projection") as handle:
        guided = generate(name)
    assert torch.equal(guided[0], before[0])
    assert all(not torch.equal(guided[i], before[i]) for i in range(1, IMAGES))
    expected = {row.block: (row.grid, row.tokens // row.calls) for row in after.summary().rows}
    rows = handle.summary().rows
    assert {row.block: (row.grid, row.tokens // row.calls) for row in rows} == expected


@pytest.mark.parametrize(
    ("name", "block", "projection", "first", "attended"),
    [
        ("cogview4", "transformer_blocks.0.attn1", "to_out.0", TEXT, None),
        ("flux2", "single_transformer_blocks.1.attn", "to_out", TEXT, 16),
        ("kandinsky 5", "visual_transformer_blocks.0.self_attention", "out_layer", 0, None),
    ],
)
def test_the_image_in_front_of_a_projection(
    name: str, block: str, projection: str, first: int, attended: int | None
) -> None:
    """CogView4 projects text and image together, FLUX.2 also the channels of its feed-forward."""

    def push(module: nn.Module, args: Any) -> Any:
        tokens = args[0].clone()
        tokens[:, first:, :attended] = negtome(tokens[:, first:, :attended], threshold=0.1)
        return (tokens,)

    place = denoiser(built(name)).get_submodule(f"{block}.{projection}")
    with place.register_forward_pre_hook(push):
        expected = generate(name, steps=1)
    settings: dict[str, Any] = {"placement": "pre_projection", "blocks": block}
    with negtome_guidance(built(name), EVERY_TOKEN, threshold=0.1, **settings):
        torch.testing.assert_close(generate(name, steps=1), expected)
    assert not torch.equal(expected, generate(name, steps=1))


def sizes() -> list[Any]:
    return [
        pytest.param(name, size, id=f"{name}-{size[0]}x{size[1]}")
        for name, family in FAMILIES.items()
        for size in family.grids
    ]


@pytest.mark.parametrize(("name", "size"), sizes())
def test_the_guided_tokens_are_those_of_the_image(name: str, size: tuple[int, int]) -> None:
    family = FAMILIES[name]
    handle = apply_negtome(built(name), EVERY_TOKEN)
    handle.remove()
    with recorded_outputs(name, handle.blocks) as unguided, ExitStack() as stack:
        handle = stack.enter_context(negtome_guidance(built(name), EVERY_TOKEN))
        guided = stack.enter_context(recorded_outputs(name, handle.blocks))
        generate(name, size=size, steps=1)
    summary = handle.summary()
    assert {row.grid for row in summary.rows} == set(family.grids[size])
    expected = image_places(name, handle.blocks, size)
    for row in summary.rows:
        assert row.grid is not None
        moved = (guided[row.block] != unguided[row.block]).any(dim=-1)
        assert not moved[0].any(), row.block
        assert torch.equal(moved[1:], expected[row.block][1:]), row.block
        tokens = family.frames * row.grid[0] * row.grid[1]
        assert expected[row.block].sum(dim=1).tolist() == [tokens] * IMAGES, row.block
        assert row.tokens == row.calls * (IMAGES - 1) * tokens


def test_each_half_of_guidance_has_captions_of_its_own() -> None:
    """Lumina 2 is called once for each half. The negative captions come last and are shorter."""
    block = "layers.1.attn"
    with recorded_outputs("lumina2", (block,)) as unguided, ExitStack() as stack:
        stack.enter_context(negtome_guidance(built("lumina2"), EVERY_TOKEN))
        guided = stack.enter_context(recorded_outputs("lumina2", (block,)))
        generate("lumina2", steps=1, cfg=True, captions=(4, 6, 9))
    moved = (guided[block] != unguided[block]).any(dim=-1)
    places = [row.nonzero().flatten().tolist() for row in moved]
    assert places == [[], list(range(5, 5 + 24)), list(range(3, 3 + 24))]


def by_image(tokens: Tensor) -> Tensor:
    """Return (images, tokens, channels), also where a block's items are the frames of videos."""
    return tokens.reshape(IMAGES, -1, tokens.shape[-1])


@contextmanager
def recorded_outputs(name: str, blocks: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Yield block -> output of its attention: of the image, or of image and text in one tensor."""
    outputs: dict[str, Tensor] = {}

    def record(block: str, output: Any) -> None:
        tokens = output[0] if isinstance(output, tuple) else output
        outputs[block] = by_image(tokens).clone()

    with ExitStack() as stack:
        for block in blocks:
            module = denoiser(built(name)).get_submodule(block)
            stack.enter_context(
                module.register_forward_hook(
                    lambda module, args, output, block=block: record(block, output)
                )
            )
        yield outputs


def image_places(name: str, blocks: tuple[str, ...], size: tuple[int, int]) -> dict[str, Tensor]:
    """Return block -> (images, tokens): True where a token of its input depends on the noise.

    No layout is used. All outputs of attention are set to zero, so that no token learns of any
    other. The tokens that then differ between two seeds belong to the image.
    """
    inputs: list[dict[str, Tensor]] = []

    def silence(block: str, args: Any, kwargs: Any, output: Any) -> Any:
        image = output[0] if isinstance(output, tuple) else output
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 3]
        if block in blocks:
            tokens = next(v for v in given if v.shape[:2] == image.shape[:2])
            inputs[-1][block] = by_image(tokens).clone()
        if isinstance(output, tuple):
            return tuple(torch.zeros_like(v) if isinstance(v, Tensor) else v for v in output)
        return torch.zeros_like(output)

    for seed in (7, 70):
        inputs.append({})
        with ExitStack() as stack:
            for block, module in denoiser(built(name)).named_modules():
                if block not in blocks and not hasattr(module, "set_processor"):
                    continue
                stack.enter_context(
                    module.register_forward_hook(
                        lambda module, args, kwargs, output, block=block: silence(
                            block, args, kwargs, output
                        ),
                        with_kwargs=True,
                    )
                )
            generate(name, size=size, steps=1, seed=seed)
    one, other = inputs
    return {block: (one[block] != other[block]).any(dim=-1) for block in blocks}


def test_every_family_is_in_the_table() -> None:
    assert {family.model for family in FAMILIES.values()} <= set(known_layouts())


def test_the_table_of_the_readme_tells_what_is_tested() -> None:
    rows = {line.split(" | ")[1]: line for line in families.table().splitlines()[2:]}
    assert set(rows) == {f"`{name}`" for name in known_layouts()}
    for family in FAMILIES.values():
        kind = "whole pipeline" if family.whole else "denoiser alone"
        assert kind in rows[f"`{family.model}`"] and family.note in rows[f"`{family.model}`"]
    untested = set(known_layouts()) - {family.model for family in FAMILIES.values()}
    assert all(rows[f"`{name}`"].endswith("| not run |") for name in untested)


class Attention(nn.Module):
    """Attention that returns its input, so that the expected result is easy to write down."""

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        return torch.cat([text, image], dim=1)


class MyTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": Attention()}) for _ in range(2)])

    def forward(self, latents: Tensor, text: Tensor, time: float) -> Tensor:
        image = nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
        for block in self.blocks:
            text, image = block["attn"](text, image).split([text.shape[1], image.shape[1]], dim=1)
        return torch.cat([text, image], dim=1)


def examples() -> dict[str, str]:
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    docstring = inspect.getdoc(register_layout) or ""
    return {
        name: next(b for b in re.findall(r"```python\n(.*?)```", t, re.DOTALL) if "MyTr" in b)
        for name, t in (("page", text), ("docstring", docstring))
    }


@pytest.mark.parametrize("name", ["page", "docstring"])
def test_the_example_of_register_layout_works(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_LAYOUTS", dict(layouts._LAYOUTS))
    exec(examples()[name], {})
    latents = noise(IMAGES, 0, 4, 4, 6)
    text = embeddings(1, TEXT, 16).repeat(IMAGES, 1, 1)
    model = MyTransformer()
    with negtome_guidance(model, threshold=0.1, t_end=500) as handle:
        early, late = model(latents, text, 0.9), model(latents, text, 0.4)
    image = nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
    assert torch.equal(late, torch.cat([text, image], dim=1))
    guided = negtome(negtome(image, threshold=0.1), threshold=0.1)
    torch.testing.assert_close(early, torch.cat([text, guided], dim=1))
    assert [(row.block, row.grid) for row in handle.summary().rows] == [
        ("blocks.0.attn", (2, 3)),
        ("blocks.1.attn", (2, 3)),
    ]
