"""apply_negtome on whole diffusers pipelines with tiny random models: FLUX, SD 1.5, SDXL."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

pytest.importorskip("diffusers")

from helpers.pipelines_fixtures import TEXT, flux_pipeline, generate, sd_pipeline, sdxl_pipeline
from negtome_fast.config import NegToMeConfig
from negtome_fast.functional import negtome
from negtome_fast.pipelines import (
    ImageTokens,
    Layout,
    apply_negtome,
    layouts,
    negtome_guidance,
    register_layout,
    remove_negtome,
)
from negtome_fast.pipelines.hooks import PipelineSchedule

FAMILIES = {"flux": flux_pipeline, "sd15": sd_pipeline, "sdxl": sdxl_pipeline}
ALWAYS = NegToMeConfig(threshold=0.1, t_end=0)
_pipelines: dict[str, Any] = {}
_plain: dict[Any, Tensor] = {}


def built(family: str) -> Any:
    if family not in _pipelines:
        _pipelines[family] = FAMILIES[family]()
    return _pipelines[family]


def denoiser(pipe: Any) -> nn.Module:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def plain(family: str, **arguments: Any) -> Tensor:
    """The unguided latents, computed once for all tests."""
    key = (family, *sorted(arguments.items()))
    if key not in _plain:
        _plain[key] = generate(FAMILIES[family](), **arguments)
    return _plain[key]


def hook_count(pipe: Any) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(m, name)) for m in denoiser(pipe).modules() for name in names)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    assert hook_count(built(request.param)) == 0


@pytest.fixture
def flux() -> Iterator[Any]:
    yield built("flux")
    assert hook_count(built("flux")) == 0


@pytest.fixture
def sdxl() -> Iterator[Any]:
    yield built("sdxl")
    assert hook_count(built("sdxl")) == 0


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


@pytest.mark.parametrize("begin", [2, None], ids=["begin_index", "no begin_index"])
def test_image_to_image_counts_its_own_steps(begin: int | None) -> None:
    """It leaves out the first timesteps of the schedule: here two of five."""

    class Pipe:
        _num_timesteps = 3

        def __init__(self) -> None:
            timesteps = torch.tensor([900.0, 700.0, 500.0, 300.0, 100.0])
            self.scheduler = SimpleNamespace(timesteps=timesteps, begin_index=begin)

        def __call__(self) -> None:
            clock = PipelineSchedule(self)
            assert clock.locate(500.2, 1.0) == (500.0, 0, 3)
            assert clock.locate(100.0, 0.0) == (100.0, 2, 3)
            assert clock.locate(400.0, 1.0) is None

    Pipe()()


@pytest.mark.parametrize("begin_index", [True, False])
def test_a_run_that_ends_early_counts_from_its_first_step(sdxl: Any, begin_index: bool) -> None:
    """SDXL with a refiner: 12 of 20 timesteps, of which the first quarter is guided."""
    if not begin_index:
        sdxl.scheduler.set_begin_index = lambda index=0: None
    with negtome_guidance(sdxl, ALWAYS, steps=(0.0, 0.25), blocks="up_blocks.0") as handle:
        generate(sdxl, 2, size=(32, 32), steps=20, denoising_end=0.6)
    vars(sdxl.scheduler).pop("set_begin_index", None)
    assert (handle.summary().guided, handle.summary().forwards) == (3, 12)


def test_another_pipeline_that_shares_the_model_finds_its_own_groups(sdxl: Any) -> None:
    other = type(sdxl).from_pipe(sdxl)
    other.set_progress_bar_config(disable=True)
    generate(sdxl, 2, steps=1)
    with negtome_guidance(sdxl, ALWAYS, steps=(0.0, 0.5)) as handle:
        generate(other, 2, steps=4, cfg=True)
        assert (handle.summary().groups, handle.summary().guided) == (2, 2)
        generate(sdxl, 2, steps=2, equal_latents=True)
        assert handle.summary().groups == 1


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


@pytest.mark.parametrize(
    ("settings", "guided"),
    [
        ({"t_end": 900}, 1),
        ({"t_start": 900, "t_end": 700}, 1),
        ({"t_end": 750}, 2),
        ({"steps": (0.0, 0.25)}, 1),
        ({"steps": (0.25, 1.0)}, 3),
    ],
    ids=str,
)
def test_the_window_in_timesteps_and_in_steps(
    flux: Any, settings: dict[str, Any], guided: int
) -> None:
    """Four steps of FLUX without shifting, at 1000, 750, 500 and 250."""
    with negtome_guidance(flux, ALWAYS, **settings) as handle:
        generate(flux, 2, steps=4, sigmas=[1.0, 0.75, 0.5, 0.25])
    assert (handle.summary().guided, handle.summary().forwards) == (guided, 4)


def test_a_timestep_rounded_to_bf16_is_read_from_the_scheduler() -> None:
    """900 / 1000 in bf16 is 898.4, which lies outside of the authors' window."""
    pipe = flux_pipeline()
    pipe.transformer.to(torch.bfloat16)
    with negtome_guidance(pipe, ALWAYS, t_end=900) as handle:
        timesteps = []
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: timesteps.append(kwargs["timestep"]), with_kwargs=True
        )
        original = pipe.scheduler.set_timesteps

        @functools.wraps(original)
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            pipe.scheduler.timesteps.copy_(torch.tensor([1000.0, 900.0, 895.0, 500.0]))

        pipe.scheduler.set_timesteps = set_timesteps
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            pipe(
                prompt_embeds=torch.randn(2, TEXT, 16, generator=random).bfloat16(),
                pooled_prompt_embeds=torch.randn(2, 16, generator=random).bfloat16(),
                height=32,
                width=32,
                num_inference_steps=4,
                output_type="latent",
            )
        hook.remove()
    assert timesteps[1].dtype == torch.bfloat16 and timesteps[1][0].item() * 1000 < 899
    assert handle.summary().guided == 2


def test_steps_need_the_pipeline(flux: Any) -> None:
    with pytest.raises(ValueError, match="pass the pipeline"):
        apply_negtome(flux.transformer, steps=(0.0, 0.5))


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


class Attention(nn.Module):
    def __init__(self, answer: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, image: Tensor, text: Tensor) -> Any:
        return self.answer(image, text)


class UnheardOf(nn.Module):
    """A third party's denoiser; `answer` is what its attention returns."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.attn = Attention(answer)

    def forward(self, hidden_states: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        output = self.attn(hidden_states, text)
        return output[0] if isinstance(output, tuple) else output[:, -hidden_states.shape[1] :]


class UnheardOfPipeline:
    def __init__(self, answer: Callable[[Tensor, Tensor], Any]) -> None:
        self.transformer = UnheardOf(answer)
        self.scheduler = type("Scheduler", (), {"timesteps": torch.tensor([1000.0, 500.0])})()

    def __call__(self, image: Tensor) -> list[Tensor]:
        outputs = []
        for step, t in enumerate(self.scheduler.timesteps):
            self.scheduler.step_index = step
            text = torch.ones(len(image), 3, 8)
            outputs.append(self.transformer(image, text, timestep=t / 7))
        return outputs


def unheard_of_input() -> Tensor:
    return torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "answer", [lambda image, text: (image, text), lambda image, text: image], ids=["tuple", "S==N"]
)
def test_an_unknown_class_is_served_where_the_rules_settle_it(answer: Any) -> None:
    pipe, image = UnheardOfPipeline(answer), unheard_of_input()
    with negtome_guidance(pipe, threshold=0.1) as handle:
        early, late = pipe(image)
    torch.testing.assert_close(early, negtome(image, threshold=0.1))
    assert torch.equal(late, image)
    assert handle.summary().guided == 1


def test_an_unknown_order_of_tokens_names_the_class_and_the_way_out() -> None:
    pipe = UnheardOfPipeline(lambda image, text: torch.cat([text, image], dim=1))
    expected = r"UnheardOf: .* attn has the shape \(3, 13, 8\) .* 10 tokens.*register_layout"
    with negtome_guidance(pipe), pytest.raises(ValueError, match=expected):
        pipe(unheard_of_input())


def test_an_unknown_class_needs_its_pipeline() -> None:
    with pytest.raises(ValueError, match=r"UnheardOf .*register_layout"):
        apply_negtome(UnheardOf(lambda image, text: image))


def test_a_registered_layout_serves_another_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_LAYOUTS", dict(layouts._LAYOUTS))
    layout = Layout(
        scheduler_timestep=lambda t: t * 7,
        guidance="sequential",
        image_tokens=lambda model, arguments: ImageTokens(10, 10, (2, 5)),
        joint="text_first",
    )
    register_layout(UnheardOf, layout)
    pipe = UnheardOfPipeline(lambda image, text: torch.cat([text, image], dim=1))
    image = unheard_of_input()
    with negtome_guidance(pipe.transformer, threshold=0.1) as handle:
        early, late = pipe(image)
    torch.testing.assert_close(early, negtome(image, threshold=0.1))
    assert torch.equal(late, image)
    assert handle.summary().rows[0].grid == (2, 5)


def test_wrong_registrations_are_refused() -> None:
    with pytest.raises(TypeError, match="must be a Layout"):
        register_layout("Model", {"latents": "x"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="class or its name"):
        register_layout("not a name", Layout())


def test_guidance_gives_no_warning_where_it_works(flux: Any) -> None:
    with warnings.catch_warnings(), negtome_guidance(flux, ALWAYS):
        warnings.simplefilter("error", UserWarning)
        generate(flux, steps=1)
