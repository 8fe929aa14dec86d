"""apply_negtome on whole diffusers pipelines with tiny random models: FLUX, SD 1.5, SDXL."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
from helpers.pipelines_fixtures import (
    ALWAYS,
    FAMILIES,
    TEXT,
    built,
    denoiser,
    generate,
    hook_count,
    plain,
)
from negtome_fast.config import NegToMeConfig
from negtome_fast.functional import negtome
from negtome_fast.pipelines import (
    apply_negtome,
    negtome_guidance,
    remove_negtome,
)


@pytest.mark.parametrize("placement", ["output", "pre_projection"])
@pytest.mark.parametrize("cfg", [False, True], ids=["plain", "cfg"])
def test_all_but_the_first_image_change_and_removal_restores(
    family: str, placement: Any, cfg: bool
) -> None:
    pipe, before = built(family), plain(family, cfg=cfg)
    handle = apply_negtome(pipe, ALWAYS, placement=placement)
    guided = generate(pipe, cfg=cfg)
    remove_negtome(pipe)
    assert torch.equal(guided[0], before[0])
    assert all(not torch.equal(guided[i], before[i]) for i in range(1, 4))
    assert hook_count(pipe) == 0
    assert torch.equal(generate(pipe, cfg=cfg), before)
    summary = handle.summary()
    sequential = cfg and family == "flux"
    assert summary.groups == (2 if cfg and family != "flux" else 1)
    assert summary.guided == summary.forwards == (4 if sequential else 2)
    assert sorted(row.block for row in summary.rows) == sorted(handle.blocks)


def test_alpha_zero_is_bit_identical_and_measures(family: str) -> None:
    with negtome_guidance(built(family), ALWAYS, alpha=0) as handle:
        assert torch.equal(generate(built(family), cfg=True), plain(family, cfg=True))
    assert handle.summary().total.matched > 0.5


def test_a_run_outside_of_the_window_is_bit_identical(family: str) -> None:
    with negtome_guidance(built(family), ALWAYS, t_start=0.5, t_end=0.1) as handle:
        assert torch.equal(generate(built(family)), plain(family))
    summary = handle.summary()
    assert (summary.forwards, summary.guided, summary.rows) == (2, 0, ())


def test_the_familys_preset_is_the_default(flux: Any, sdxl: Any) -> None:
    for pipe, preset in ((flux, "flux"), (sdxl, "sdxl")):
        with negtome_guidance(pipe) as handle:
            assert handle.config == NegToMeConfig.preset(preset)
    assert all(name.startswith("up_blocks.") for name in handle.blocks)


def test_the_guided_tokens_of_flux_are_the_image_and_not_the_text(flux: Any) -> None:
    """The first step against hooks that are written out here."""

    def push(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (negtome(output[0], threshold=0.1), *output[1:])
        image = negtome(output[:, TEXT:], threshold=0.1)
        return torch.cat([output[:, :TEXT], image], dim=1)

    blocks = [*flux.transformer.transformer_blocks, *flux.transformer.single_transformer_blocks]
    hooks = [block.attn.register_forward_hook(push) for block in blocks]
    expected = generate(flux, steps=1)
    for hook in hooks:
        hook.remove()
    with negtome_guidance(flux, ALWAYS):
        torch.testing.assert_close(generate(flux, steps=1), expected)


def test_pre_projection_is_before_the_output_projection(flux: Any) -> None:
    def push(module: nn.Module, args: Any) -> Any:
        return (negtome(args[0], threshold=0.1),)

    blocks = flux.transformer.transformer_blocks
    hooks = [block.attn.to_out[0].register_forward_pre_hook(push) for block in blocks]
    expected = generate(flux, steps=1)
    for hook in hooks:
        hook.remove()
    settings = {"placement": "pre_projection", "blocks": "transformer_blocks"}
    with negtome_guidance(flux, ALWAYS, **settings) as handle:
        torch.testing.assert_close(generate(flux, steps=1), expected)
    assert handle.blocks == ("transformer_blocks.0.attn", "transformer_blocks.1.attn")


@pytest.mark.parametrize("size", [(32, 32), (48, 96), (96, 48)], ids=str)
@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_grids_are_right_at_every_size(name: str, size: tuple[int, int]) -> None:
    pipe = built(name)
    with negtome_guidance(pipe, ALWAYS) as handle:
        generate(pipe, 2, size=size, steps=1)
    height, width = size[0] // 8, size[1] // 8
    grids = {row.grid for row in handle.summary().rows}
    half = (height // 2, width // 2)
    assert grids == ({half} if name == "flux" else {(height, width), half})


def test_min_grid_leaves_small_blocks_out(sdxl: Any) -> None:
    with negtome_guidance(sdxl, ALWAYS, min_grid=(8, 12)) as handle:
        generate(sdxl, steps=1)
    assert {row.grid for row in handle.summary().rows} == {(8, 12)}


def test_a_min_grid_that_leaves_everything_out_is_reported(sdxl: Any) -> None:
    with negtome_guidance(sdxl), pytest.warns(UserWarning, match=r"min_grid=\(32, 32\)"):
        assert torch.equal(generate(sdxl), plain("sdxl"))


def test_blocks_are_filtered_by_name(flux: Any) -> None:
    with negtome_guidance(flux, ALWAYS, exclude_blocks="single_transformer_blocks.1") as handle:
        generate(flux, steps=1)
    assert [row.block for row in handle.summary().rows] == [
        "transformer_blocks.0.attn",
        "transformer_blocks.1.attn",
        "single_transformer_blocks.0.attn",
    ]


def test_a_single_image_has_nothing_to_be_pushed_from(flux: Any) -> None:
    with negtome_guidance(flux, ALWAYS), pytest.warns(UserWarning, match="only reference items"):
        assert torch.equal(generate(flux, 1), plain("flux", images=1))


def test_others_moves_the_first_image_too(flux: Any) -> None:
    with negtome_guidance(flux, ALWAYS, reference="others"):
        assert not torch.equal(generate(flux)[0], plain("flux")[0])


def test_dropout_repeats_with_every_run(sdxl: Any) -> None:
    with negtome_guidance(sdxl, ALWAYS, dropout=0.5) as handle:
        first = generate(sdxl)
        assert torch.equal(generate(sdxl), first)
    assert 0.3 < handle.summary().total.pushed < 0.7


def test_the_summary_counts_all_runs_until_it_is_reset(flux: Any) -> None:
    with negtome_guidance(flux, ALWAYS) as handle:
        generate(flux)
        generate(flux)
        assert handle.summary().forwards == 4
        assert handle.summary().rows[0].tokens == 4 * 3 * 24
        handle.reset()
        assert handle.summary().forwards == 0


def test_the_edit_image_of_kontext_is_not_guided(flux: Any) -> None:
    """Tokens of the input image follow the generated ones; their ids start with 1."""
    seen: dict[str, Tensor] = {}
    attention = flux.transformer.transformer_blocks[0].attn
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    own = torch.stack([torch.zeros(24), rows.flatten(), columns.flatten()], dim=1)
    given = own + torch.tensor([1.0, 0.0, 0.0])
    random = torch.Generator().manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(2, 48, 16, generator=random),
        "timestep": torch.tensor([1.0, 1.0]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16, generator=random).expand(2, -1, -1),
        "pooled_projections": torch.zeros(2, 16),
        "img_ids": torch.cat([own, given]),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    for guided in ("no", "yes"):
        handle = apply_negtome(flux.transformer, ALWAYS) if guided == "yes" else None
        hook = attention.register_forward_hook(
            lambda module, args, output, key=guided: seen.__setitem__(key, output[0])
        )
        with torch.no_grad():
            flux.transformer(**arguments)
        hook.remove()
        if handle is not None:
            handle.remove()
    changed = (seen["no"] != seen["yes"]).any(dim=-1)
    assert changed[1, :24].all() and not changed[:, 24:].any() and not changed[0].any()


def test_the_output_that_another_hook_keeps_is_not_written_into(flux: Any) -> None:
    kept: list[Tensor] = []
    attention = flux.transformer.single_transformer_blocks[0].attn
    hook = attention.register_forward_hook(lambda m, args, output: kept.append(output))
    with negtome_guidance(flux, ALWAYS, blocks="single_transformer_blocks.0"):
        generate(flux, steps=1)
    generate(flux, steps=1)
    hook.remove()
    assert torch.equal(*kept)


@pytest.mark.parametrize("inside", ["to_out.0", "to_out.1"])
def test_what_a_hook_inside_the_attention_keeps_is_not_written_into(flux: Any, inside: str) -> None:
    """The dropout after the projection hands it on as it is."""
    kept: list[Tensor] = []
    module = flux.transformer.transformer_blocks[0].attn.get_submodule(inside)
    if inside == "to_out.0":
        hook = module.register_forward_hook(lambda m, args, output: kept.append(output))
    else:
        hook = module.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    with negtome_guidance(flux, ALWAYS, blocks="transformer_blocks.0"):
        generate(flux, steps=1)
    generate(flux, steps=1)
    hook.remove()
    assert torch.equal(*kept)


@pytest.mark.parametrize(
    ("family", "regional", "compiled_first", "placement"),
    [
        ("flux", True, False, "output"),
        ("flux", True, True, "pre_projection"),
        ("flux", False, True, "output"),
        ("sdxl", False, False, "output"),
    ],
)
def test_a_compiled_model_is_guided_like_another(
    family: str, regional: bool, compiled_first: bool, placement: Any
) -> None:
    """Without graph breaks, which `fullgraph` refuses, and with code that all blocks share.

    Where it is regional, the last of the steps are outside of the window.
    """
    settings = {"t_end": 500 if regional else 0, "placement": placement}
    arguments = {"images": 2, "size": (32, 32), "cfg": family == "sdxl", "steps": 5}
    with negtome_guidance(built(family), ALWAYS, **settings) as handle:
        expected = generate(built(family), **arguments)
    expected_rows = handle.summary().rows
    pipe = FAMILIES[family]()
    name = "transformer" if family == "flux" else "unet"

    def compile_model() -> None:
        if regional:
            denoiser(pipe).compile_repeated_blocks(fullgraph=True, backend="eager")
        else:
            setattr(pipe, name, torch.compile(denoiser(pipe), fullgraph=True, backend="eager"))

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = 4
    try:
        if compiled_first:
            compile_model()
            torch.testing.assert_close(generate(pipe, **arguments), plain(family, **arguments))
        handle = apply_negtome(pipe, ALWAYS, **settings)
        if not compiled_first:
            compile_model()
        torch.testing.assert_close(generate(pipe, **arguments), expected)
        assert [(row.block, row.grid, row.calls, row.tokens) for row in handle.summary().rows] == [
            (row.block, row.grid, row.calls, row.tokens) for row in expected_rows
        ]
        if compiled_first:
            remove_negtome(pipe)
            torch.testing.assert_close(generate(pipe, **arguments), plain(family, **arguments))
    finally:
        torch._dynamo.config.recompile_limit = limit
        torch.compiler.reset()


def test_guidance_gives_no_warning_where_it_works(flux: Any) -> None:
    with warnings.catch_warnings(), negtome_guidance(flux, ALWAYS):
        warnings.simplefilter("error", UserWarning)
        generate(flux, steps=1)
