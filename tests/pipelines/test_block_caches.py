"""Guidance together with caches that skip blocks: cache-dit and ParaAttention.

ParaAttention is built from source when it is installed and is no part of the extra `all`; its tests
run where it is. A cache of a few lines stands in where the forward that skips has to be chosen.
"""

from __future__ import annotations

import ast
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import negtome_fast as nf
from helpers.families import FAMILIES
from helpers.pipelines_fixtures import flux_pipeline, generate
from negtome_fast import Reference, models
from negtome_fast.pipelines.block_caches import CacheGuard, is_marked

PROMPT = "a pixel art person"
STEPS = 20
PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
GUIDANCE = {"alpha": 0.9, "threshold": 0.5, "t_end": 750, "reference": "others"}
"""12 forwards of the embedded model: each half of classifier-free guidance is one."""


@pytest.fixture(scope="module")
def embedded() -> Any:
    return models.load_pipeline()


def latents(pipe: Any, **call: Any) -> list[torch.Tensor]:
    """After every step of a run."""
    seen: list[torch.Tensor] = []

    def keep(_: Any, __: int, ___: Any, kept: dict[str, Any]) -> dict[str, Any]:
        seen.append(kept["latents"].clone())
        return kept

    models.generate(
        pipe, PROMPT, [0, 1], steps=STEPS, output_type="latent", callback_on_step_end=keep, **call
    )
    return seen


class Skipping:
    """On a tiny FLUX: the last block gives back its input in the forwards that are named."""

    def __init__(self, pipe: Any, forwards: set[int]) -> None:
        self.model = pipe.transformer
        self.model._is_cached = True
        block, self.count = self.model.single_transformer_blocks[-1], -1
        whole, owner = block.forward, self

        def forward(self: Any, hidden_states: Any, encoder_hidden_states: Any, **rest: Any) -> Any:
            if owner.count in forwards:
                return encoder_hidden_states, hidden_states
            return whole(
                hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **rest
            )

        block.forward = MethodType(forward, block)
        self.model.register_forward_pre_hook(self.step)

    def step(self, *_: Any) -> None:
        self.count += 1


# Four steps of the tiny FLUX have the timesteps 1000, 750, 500, 250: the first two are guided.
WINDOW = {"t_end": 700, "threshold": 0.0}


@pytest.mark.parametrize(
    ("forwards", "words"),
    [
        ({0}, "inside the window"),
        ({1}, "inside the window"),
        ({2}, "the first after the window"),
        ({3}, None),
        (set(), None),
    ],
    ids=["first", "last-guided", "first-after", "later", "none"],
)
def test_guided_outputs_are_never_reused_nor_left_out(
    forwards: set[int], words: str | None
) -> None:
    pipe = flux_pipeline()
    Skipping(pipe, forwards)
    handle = nf.apply_negtome(pipe, **WINDOW)
    if words is None:
        generate(pipe, 2, steps=4)
        assert handle.summary().guided == 2
    else:
        with pytest.raises(ValueError, match=rf"skipped 1 of 4 attention blocks.*{words}"):
            generate(pipe, 2, steps=4)
    nf.remove_negtome(pipe)
    assert not any(m._forward_pre_hooks for m in pipe.transformer.transformer_blocks.modules())


def test_both_forwards_of_the_step_after_the_window_must_be_whole() -> None:
    for skipped, refused in ((4, True), (5, True), (6, False)):
        pipe = flux_pipeline()
        Skipping(pipe, {skipped})
        with nf.negtome_guidance(pipe, **WINDOW):
            if refused:
                with pytest.raises(ValueError, match="the first after the window"):
                    generate(pipe, 2, steps=4, cfg=True)
            else:
                generate(pipe, 2, steps=4, cfg=True)


def test_a_run_after_a_refused_one_is_as_if_there_had_been_none() -> None:
    pipe = flux_pipeline()
    skipping = Skipping(pipe, {1})
    with nf.negtome_guidance(pipe, **WINDOW):
        with pytest.raises(ValueError, match="inside the window"):
            generate(pipe, 2, steps=4)
        skipping.count = 100
        again = generate(pipe, 2, steps=4)
    other = flux_pipeline()
    with nf.negtome_guidance(other, **WINDOW):
        assert torch.equal(again, generate(other, 2, steps=4))


def test_references_and_compiled_models_are_refused_with_a_cache() -> None:
    pipe = flux_pipeline()
    pipe.transformer._is_cached = True
    latent = torch.zeros(1, 96, 16)
    with pytest.raises(ValueError, match="the references' forward would count"):
        nf.apply_negtome(pipe, reference=Reference(latent))
    pipe.transformer.transformer_blocks[0].compile()
    with pytest.raises(ValueError, match="is compiled and has a cache"):
        nf.apply_negtome(pipe)
    assert not pipe.transformer._forward_pre_hooks


def test_a_cache_that_comes_later_is_noticed() -> None:
    pipe = flux_pipeline()
    latent = torch.zeros(1, 96, 16)
    with nf.negtome_guidance(pipe, reference=Reference(latent), **WINDOW):
        pipe.transformer._is_cached = True
        with pytest.raises(ValueError, match="the references' forward would count"):
            generate(pipe, 2, steps=4)


def test_nothing_is_counted_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheGuard, "__init__", None)
    pipe = flux_pipeline()
    with nf.negtome_guidance(pipe, **WINDOW):
        generate(pipe, 2, steps=4)


def test_code_of_the_page_parses() -> None:
    codes = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(codes) == 6
    for code in codes:
        ast.parse(code)


def test_caches_without_the_mark_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def skipping(self: Any, *args: Any, **kwargs: Any) -> None: ...

    model = flux_pipeline().transformer
    monkeypatch.setitem(sys.modules, "xfuser", ModuleType("xfuser"))
    assert not is_marked(model)
    source = {"__name__": "xfuser.model_executor.cache.diffusers_adapters.flux"}
    model.forward = MethodType(FunctionType(skipping.__code__, source), model)  # as xDiT does
    assert is_marked(model)
    del model.forward
    blocks = model.transformer_blocks
    place = {"__module__": "xfuser.model_executor.cache.diffusers_adapters.flux2"}
    model.transformer_blocks = torch.nn.ModuleList([type("Cached", (torch.nn.Module,), place)()])
    assert is_marked(model)
    model.transformer_blocks = blocks
    model._hook_registry = SimpleNamespace(_hooks={"teacache": object()})  # as vLLM-Omni does
    assert is_marked(model)
    model._hook_registry._hooks.clear()
    assert not is_marked(model)


@pytest.fixture
def cache_dit(embedded: Any) -> Iterator[Any]:
    """cache-dit, and the embedded pipeline without it afterwards."""
    library = pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    logging.disable(logging.WARNING)
    yield library
    library.disable_cache(embedded)
    logging.disable(logging.NOTSET)


def enable(library: Any, pipe: Any, warmup: int, threshold: float = 0.3, **more: Any) -> Any:
    """The cache, which computes `warmup` forwards in any case."""
    config = library.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=warmup,
        residual_diff_threshold=threshold,
    )
    library.enable_cache(pipe, cache_config=config, **more)
    assert is_marked(pipe.transformer)
    return pipe


def test_cache_dit_that_starts_after_the_window_leaves_it_exact(
    embedded: Any, cache_dit: Any
) -> None:
    with nf.negtome_guidance(embedded, **GUIDANCE):
        alone = latents(embedded)
    enable(cache_dit, embedded, warmup=14, threshold=2.0)
    unguided = latents(embedded)
    with nf.negtome_guidance(embedded, **GUIDANCE) as handle:
        together = latents(embedded)
        assert handle.summary().guided == 12
    # The window is six steps, and the seventh is computed; what follows comes from the cache.
    assert all(torch.equal(a, b) for a, b in zip(alone[:7], together[:7], strict=True))
    assert not torch.equal(alone[-1], together[-1])
    assert all(torch.equal(a, b) for a, b in zip(unguided, latents(embedded), strict=True))


@pytest.mark.parametrize(
    ("warmup", "words"),
    [(4, "inside the window"), (12, "first after the window"), (13, "first after the window")],
)
def test_cache_dit_that_starts_too_early_is_refused(
    embedded: Any, cache_dit: Any, warmup: int, words: str
) -> None:
    enable(cache_dit, embedded, warmup, threshold=2.0)
    with (
        nf.negtome_guidance(embedded, **GUIDANCE),
        pytest.raises(ValueError, match=f"{words}.*max_warmup_steps"),
    ):
        latents(embedded)
    latents(embedded)  # the pipeline is as before


def test_cache_dit_that_prunes_blocks_in_the_window_is_refused(
    embedded: Any, cache_dit: Any
) -> None:
    config = cache_dit.DBPruneConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, residual_diff_threshold=2.0
    )
    cache_dit.enable_cache(embedded, cache_config=config)
    with (
        nf.negtome_guidance(embedded, **GUIDANCE),
        pytest.raises(ValueError, match="at timestep 950, inside the window"),
    ):
        latents(embedded)


def test_cache_dit_as_on_the_page(cache_dit: Any) -> None:
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0], names)
    assert names["handle"].summary().guided == 12
    assert not torch.equal(names["images"][0], names["images"][1])
    cache_dit.disable_cache(names["pipe"])


def test_cache_dit_may_come_after_guidance(embedded: Any, cache_dit: Any) -> None:
    with nf.negtome_guidance(embedded, **GUIDANCE):
        alone = latents(embedded)
        enable(cache_dit, embedded, warmup=2 * STEPS)
        assert torch.equal(alone[-1], latents(embedded)[-1])


def test_cache_dit_that_predicts_is_refused(embedded: Any, cache_dit: Any) -> None:
    predictor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    enable(cache_dit, embedded, warmup=14, calibrator_config=predictor)
    with pytest.raises(ValueError, match="predicts outputs from several earlier forwards"):
        nf.apply_negtome(embedded, **GUIDANCE)
    cache_dit.disable_cache(embedded)
    nf.apply_negtome(embedded, **GUIDANCE).remove()


def test_cache_dit_with_references_is_refused(embedded: Any, cache_dit: Any) -> None:
    enable(cache_dit, embedded, warmup=14)
    picture = Image.new("RGB", (64, 64), "#f7d9b8")
    with pytest.raises(ValueError, match="remove it, or guide without references"):
        nf.apply_negtome(embedded, reference=Reference(picture))


@pytest.fixture
def para_attention() -> Iterator[Any]:
    """ParaAttention's adapter of Wan, whose mark on the class of the pipeline is taken off."""
    name = "para_attn.first_block_cache.diffusers_adapters.wan"
    adapter = pytest.importorskip(name, reason="ParaAttention is not installed")
    from diffusers import WanPipeline

    call = WanPipeline.__call__
    yield adapter
    WanPipeline.__call__ = call
    if "_is_cached" in vars(WanPipeline):
        del WanPipeline._is_cached


def wan_video(pipe: Any) -> torch.Tensor:
    return FAMILIES["wan"].generate(pipe, 2, size=(32, 48), steps=8, seed=1)


@pytest.mark.parametrize(
    ("warmup", "threshold", "words"),
    [(8, 9.0, None), (0, 0.0, None), (4, 9.0, None), (3, 9.0, "after the"), (1, 9.0, "inside")],
    ids=["all-computed", "never-alike", "after-window", "too-early", "in-window"],
)
def test_para_attention(
    para_attention: Any, warmup: int, threshold: float, words: str | None
) -> None:
    guidance = {"t_end": 700, "threshold": 0.0}  # the first three of eight steps
    alone = FAMILIES["wan"].build()
    with nf.negtome_guidance(alone, **guidance) as handle:
        expected = wan_video(alone)
        assert handle.summary().guided == 3
    pipe = FAMILIES["wan"].build()
    settings = {"warmup_steps": warmup, "residual_diff_threshold": threshold}
    para_attention.apply_cache_on_pipe(pipe, enable_alter_cache=False, **settings)
    cached = wan_video(pipe)
    with nf.negtome_guidance(pipe, **guidance) as handle:
        if words is not None:
            with pytest.raises(ValueError, match=words):
                wan_video(pipe)
            return
        together = wan_video(pipe)
        assert handle.summary().guided == 3
    assert torch.equal(together, expected) == (warmup != 4)
    assert torch.equal(wan_video(pipe), cached)
