"""Forwards that other libraries replaced: caches as functions, step caches, token merging."""

from __future__ import annotations

import ast
import re
from types import MethodType
from typing import Any

import pytest
import torch
from diffusers import hooks
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

import negtome_fast as nf
from helpers.pipelines_fixtures import (
    flux_pipeline,
    generate,
    reference_latents,
    sd_pipeline,
    sdxl_pipeline,
)
from negtome_fast.pipelines.blocks import attention_modules
from negtome_fast.pipelines.layouts import layout_of
from negtome_fast.pipelines.replaced_forwards import replaced_forward, replacement_of

WINDOW = {"t_end": 700, "threshold": 0.0}
"""Four steps of the tiny FLUX have the timesteps 1000, 750, 500, 250: the first two are guided."""


def ids_of(caches: dict[str, Any]) -> list[Any]:
    return [pytest.param(name, apply, id=name) for name, apply in caches.items()]


def first_block(model: nn.Module) -> None:
    hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig(threshold=0.5))


def pyramid(model: nn.Module) -> None:
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )
    hooks.apply_pyramid_attention_broadcast(model, config)


def magnitude(model: nn.Module) -> None:
    config = hooks.MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4))
    hooks.apply_mag_cache(model, config)


def taylor(model: nn.Module) -> None:
    hooks.apply_taylorseer_cache(model, hooks.TaylorSeerCacheConfig(cache_interval=2))


def faster(model: nn.Module) -> None:
    config = hooks.FasterCacheConfig(current_timestep_callback=lambda: 500)
    hooks.apply_faster_cache(model, config)


CACHES = {
    "apply_first_block_cache": first_block,
    "apply_pyramid_attention_broadcast": pyramid,
    "apply_mag_cache": magnitude,
    "apply_taylorseer_cache": taylor,
    "apply_faster_cache": faster,
}


@pytest.mark.parametrize("later", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("name", "apply"), ids_of(CACHES))
def test_a_cache_that_was_called_as_a_function_is_refused_by_name(
    name: str, apply: Any, later: bool
) -> None:
    pipe = flux_pipeline()
    model = pipe.transformer
    assert not model.is_cache_enabled
    if later:
        handle = nf.apply_negtome(pipe, **WINDOW)
        apply(model)
        with pytest.raises(ValueError, match=name) as refused:
            generate(pipe, 2, steps=4)
        handle.remove()
    else:
        apply(model)
        with pytest.raises(ValueError, match=name) as refused:
            nf.apply_negtome(pipe, **WINDOW)
    # The advice is followed to the letter.
    registry = HookRegistry.check_if_exists_or_initialize(model)
    for key in re.findall(r"registry\.remove_hook\(('.*?')\)", str(refused.value)):
        registry.remove_hook(ast.literal_eval(key))
    with nf.negtome_guidance(pipe, **WINDOW):
        cleaned = generate(pipe, 2, steps=4)
    fresh = flux_pipeline()
    with nf.negtome_guidance(fresh, **WINDOW):
        assert torch.equal(cleaned, generate(fresh, 2, steps=4))


class Keeping(ModelHook):
    """Keeps every output of its module, without telling that it does."""

    def __init__(self, stateful: bool = False) -> None:
        super().__init__()
        self._is_stateful = stateful
        self.kept: list[tuple[Tensor, Tensor]] = []

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = self.fn_ref.original_forward(*args, **kwargs)
        tensor = output[0] if isinstance(output, tuple) else output
        self.kept.append((tensor, tensor.clone()))
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.kept.clear()
        return module


def test_a_hook_that_keeps_state_is_refused_by_its_class() -> None:
    pipe = flux_pipeline()
    attention = pipe.transformer.transformer_blocks[0].attn
    hook = Keeping(stateful=True)
    HookRegistry.check_if_exists_or_initialize(attention).register_hook(hook, "mine")
    with pytest.raises(ValueError, match=r"Keeping \(at transformer_blocks.0.attn\)"):
        nf.apply_negtome(pipe)


def keep_by_forward(attention: nn.Module, kept: list[tuple[Tensor, Tensor]]) -> None:
    whole = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = whole(*args, **kwargs)
        kept.append((output, output.clone()))
        return output

    attention.forward = forward


def keep_by_processor(attention: Any, kept: list[tuple[Tensor, Tensor]]) -> None:
    processor = attention.processor

    class Recorder:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            output = processor(*args, **kwargs)
            kept.append((output, output.clone()))
            return output

    attention.processor = Recorder()


def keep_by_accelerate(attention: nn.Module, kept: list[tuple[Tensor, Tensor]]) -> None:
    from accelerate.hooks import ModelHook as AccelerateHook
    from accelerate.hooks import add_hook_to_module

    class Recorder(AccelerateHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            kept.append((output, output.clone()))
            return output

    add_hook_to_module(attention, Recorder())


def keep_by_hook(attention: nn.Module, kept: list[tuple[Tensor, Tensor]]) -> None:
    hook = Keeping()
    hook.kept = kept
    HookRegistry.check_if_exists_or_initialize(attention).register_hook(hook, "mine")


@pytest.mark.parametrize(
    "keep", [keep_by_forward, keep_by_processor, keep_by_accelerate, keep_by_hook]
)
def test_a_tensor_that_others_may_keep_is_never_written_into(keep: Any) -> None:
    """A cache that gives the tensor back would be pushed again in each step."""
    pipe = sd_pipeline()
    kept: list[tuple[Tensor, Tensor]] = []
    for module, name in attention_modules(pipe.unet, layout_of(pipe.unet)).items():
        if name.endswith("attn1"):
            keep(module, kept)
    with nf.negtome_guidance(pipe, threshold=-1.0, t_end=0, min_grid=None, blocks=None) as handle:
        generate(pipe, 2, steps=2)
    assert handle.summary().total.pushed > 0.9
    assert len(kept) > 4
    assert all(torch.equal(tensor, copy) for tensor, copy in kept)


class StepCache:
    """Replaces `forward` as the step caches of UNets do: in some forwards no block is computed."""

    def __init__(self, model: nn.Module, skipped: set[int]) -> None:
        self.count, self.skipped, self.last = -1, skipped, None
        whole = model.forward

        def cached_forward(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count not in self.skipped:
                self.last = whole(*args, **kwargs)
            return self.last

        model.forward = cached_forward


class AttentionCache:
    """Replaces the `forward` of one attention module, which then gives back its last output."""

    def __init__(self, model: Any, skipped: set[int]) -> None:
        attention = next(m for n, m in model.named_modules() if n.endswith("attn1"))
        self.count, self.last = -1, None
        whole = attention.forward

        def cached_attention(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count not in skipped:
                self.last = whole(*args, **kwargs)
            return self.last

        attention.forward = cached_attention


UNET_WINDOW = {"t_end": 500, "threshold": -1.0, "min_grid": None, "blocks": None}
"""Four steps of the tiny UNet have the timesteps 751, 501, 251, 1: the first two are guided."""


@pytest.mark.parametrize("cache", [StepCache, AttentionCache])
@pytest.mark.parametrize(
    ("skipped", "words"),
    [({1}, "inside the window"), ({2}, "the first after the window"), ({3}, None)],
    ids=["guided", "first-after", "later"],
)
def test_a_replaced_forward_may_skip_only_after_the_window(
    cache: Any, skipped: set[int], words: str | None
) -> None:
    pipe = sd_pipeline()
    cache(pipe.unet, skipped)
    handle = nf.apply_negtome(pipe, **UNET_WINDOW)
    if words is None:
        generate(pipe, 2, steps=4)
        assert handle.summary().guided == 2
    else:
        with pytest.raises(ValueError, match=rf"cached_\w+ \(in place of .*{words}"):
            generate(pipe, 2, steps=4)


def test_a_step_cache_that_starts_after_the_window_leaves_guidance_exact() -> None:
    def run(pipe: Any) -> list[Tensor]:
        seen: list[Tensor] = []

        def keep(_: Any, __: int, ___: Any, kept: dict[str, Any]) -> dict[str, Any]:
            seen.append(kept["latents"].clone())
            return kept

        with nf.negtome_guidance(pipe, **UNET_WINDOW):
            generate(pipe, 2, steps=4, callback_on_step_end=keep)
        return seen

    cached, whole = sd_pipeline(), sd_pipeline()
    StepCache(cached.unet, {3})
    with_cache, without = run(cached), run(whole)
    assert all(map(torch.equal, with_cache[:3], without[:3]))
    assert not torch.equal(with_cache[3], without[3])


def test_a_forward_that_the_class_was_given_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = flux_pipeline()
    cls = type(pipe.transformer)
    whole = cls.forward
    calls: list[Any] = []

    def teacache_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(calls) != 1:
            calls.append(whole(self, *args, **kwargs))
            return calls[-1]
        calls.append(None)
        return calls[0]

    monkeypatch.setattr(cls, "forward", teacache_forward)
    nf.apply_negtome(pipe, **WINDOW)
    with pytest.raises(ValueError, match=r"teacache_forward \(in place of FluxTransformer2DModel"):
        generate(pipe, 2, steps=4)


def test_references_are_refused_with_a_replaced_forward() -> None:
    pipe = flux_pipeline()
    handle = nf.apply_negtome(pipe, reference=nf.Reference(reference_latents(pipe)), **WINDOW)
    StepCache(pipe.transformer, set())
    with pytest.raises(ValueError, match=r"cached_forward.*the references' forward would count"):
        generate(pipe, 1, steps=4)
    handle.remove()
    with pytest.raises(ValueError, match=r"cached_forward.*the references' forward would count"):
        nf.apply_negtome(pipe, reference=nf.Reference(reference_latents(pipe)))


SDXL = {"t_end": 0, "threshold": 0.0, "min_grid": None, "blocks": None}


def no_change(model: nn.Module) -> None:
    """Leaves the model as it is."""


def group_offload(model: nn.Module) -> None:
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def layerwise_casting(model: nn.Module) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float32)


def accelerate_hooks(model: nn.Module) -> None:
    from accelerate.hooks import ModelHook as AccelerateHook
    from accelerate.hooks import add_hook_to_module

    for module in model.modules():
        add_hook_to_module(module, AccelerateHook())


def replaced_layers(model: nn.Module) -> None:
    """As the LoRA loaders of other tools do: a linear layer runs a function of theirs."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = MethodType(
                lambda self, x: nn.functional.linear(x, self.weight, self.bias), module
            )


def several(model: nn.Module) -> None:
    layerwise_casting(model)
    group_offload(model)
    accelerate_hooks(model)


@pytest.mark.parametrize(
    "wrap",
    [no_change, group_offload, layerwise_casting, accelerate_hooks, replaced_layers, several],
)
def test_wrappers_that_compute_every_block_are_no_cache(wrap: Any) -> None:
    pipe = sdxl_pipeline()
    wrap(pipe.unet)
    modules = attention_modules(pipe.unet, layout_of(pipe.unet))
    assert replaced_forward(pipe.unet, modules) is None
    with nf.negtome_guidance(pipe, **SDXL) as handle:
        # The hooks of the guidance do not count, either.
        assert replaced_forward(pipe.unet, modules) is None
        guided = generate(pipe, 2)
    assert handle.summary().total.pushed > 0
    plain = sdxl_pipeline()
    with nf.negtome_guidance(plain, **SDXL):
        assert torch.equal(guided, generate(plain, 2))


def test_a_compiled_forward_is_no_cache() -> None:
    module = flux_pipeline().transformer.transformer_blocks[0]
    module.forward = torch.compile(module.forward, backend="eager")
    assert replacement_of(module) is None


def merged(block: Any) -> None:
    """As tomesd does: the block gets a class of the library, which halves the tokens of attn1."""

    class ToMeBlock(type(block)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            rest = {k: kwargs[k] for k in ("encoder_hidden_states", "encoder_attention_mask")}
            attended = self.attn1(self.norm1(hidden_states)[:, ::2])
            hidden_states = hidden_states + attended.repeat_interleave(2, dim=1)
            attended = self.attn2(
                self.norm2(hidden_states),
                encoder_hidden_states=rest["encoder_hidden_states"],
                attention_mask=rest["encoder_attention_mask"],
            )
            hidden_states = hidden_states + attended
            return hidden_states + self.ff(self.norm3(hidden_states))

    ToMeBlock.__module__ = "tomesd.patch"
    block.__class__ = ToMeBlock


def test_token_merging_is_named_with_what_helps() -> None:
    pipe = sd_pipeline()
    for module in list(pipe.unet.modules()):
        if type(module).__name__ == "BasicTransformerBlock":
            merged(module)
    with (
        nf.negtome_guidance(pipe, **SDXL),
        pytest.raises(
            ValueError, match=r'library tomesd changed.*exclude_blocks=\["attn1"\].*remove_patch'
        ),
    ):
        generate(pipe, 2)
    with nf.negtome_guidance(pipe, exclude_blocks=["attn1"], **SDXL) as handle:
        generate(pipe, 2)
    summary = handle.summary()
    assert summary.guided == summary.forwards > 0
    assert {row.block.rpartition(".")[2] for row in summary.rows} == {"attn2"}
