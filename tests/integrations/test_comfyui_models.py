"""ComfyUI's own model classes, small and random, in this process: places, groups, equality.

Run where `COMFYUI_PATH` names a checkout of ComfyUI whose requirements this Python has.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import negtome_fast as nf
from helpers import comfyui_program
from helpers.comfyui_classes import EDITING, FLUX, build, call, completed, draw_latents
from negtome_fast.guidance import Guidance
from negtome_fast.integrations.comfyui import nodes
from negtome_fast.integrations.comfyui.guide import guides_of
from negtome_fast.integrations.comfyui.places import PLACES, hooked, image_grid

pytestmark = pytest.mark.skipif(
    "COMFYUI_PATH" not in os.environ,
    reason="needs ComfyUI: set COMFYUI_PATH to a checkout whose requirements this Python has",
)

ATTENTIONS = {
    "Flux": 2,
    "Chroma": 2,
    "OpenAISignatureMMDITWrapper": 3,
    "MMDiT": 2,
    "PixArtMS": 2,
    "QwenImageTransformer2DModel": 1,
    "WanModel": 2,
    "HunyuanVideo": 2,
}


@pytest.mark.parametrize(
    ("name", "editing"), [*((name, False) for name in PLACES), *((name, True) for name in EDITING)]
)
def test_the_tokens_of_each_class_are_those_of_its_image(name: str, editing: bool) -> None:
    """A change to one token after the last attention appears in its patch only."""
    model, latents = build(name), draw_latents(name, 1)
    given = {"ref_latents": [draw_latents(name, 1)[..., :6, :8]]} if editing else {}
    plain = call(model, latents, **given)
    frames, height, width = image_grid(model, latents)
    assert (2 * height, 2 * width) == latents.shape[-2:]
    blocks: list[str] = []
    with hooked(model, latents, lambda tokens, block: blocks.append(block) or tokens):
        assert torch.equal(call(model, latents, **given), plain)
    assert len(blocks) == len(set(blocks))
    for frame, row, column in ((0, 0, 0), (0, 2, 3), (frames - 1, height - 1, width - 1)):
        number = (frame * height + row) * width + column

        def add(tokens: torch.Tensor, block: str, number: int = number) -> torch.Tensor:
            assert tokens.shape[:2] == (1, frames * height * width)
            if block == blocks[-1]:
                tokens[:, number] += 1.0
            return tokens

        with hooked(model, latents, add):
            moved = call(model, latents, **given)
        # Channels and items do not matter.
        changed = (moved != plain).reshape(16, frames, 2 * height, 2 * width).any(dim=0)
        expected = torch.zeros_like(changed)
        patch = slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)
        expected[(frame, *patch)] = True
        assert torch.equal(changed & expected, changed) and changed.any()
    assert torch.equal(call(model, latents, **given), plain)


@pytest.mark.parametrize("name", PLACES)
def test_each_class_is_guided_in_all_of_its_blocks(name: str) -> None:
    model, latents = build(name), draw_latents(name, 3)
    plain = call(model, latents)
    guidance = Guidance(nf.NegToMeConfig(threshold=-1.0, t_end=0))
    guidance.begin_step(900.0)
    with hooked(
        model, latents, lambda tokens, block: guidance.apply(tokens, block=block, inplace=True)
    ):
        guided = call(model, latents)
    guidance.end_step()
    assert guided.isfinite().all()
    assert torch.equal(guided[0], plain[0])
    assert not torch.equal(guided[1], plain[1]) and not torch.equal(guided[2], plain[2])
    frames, height, width = image_grid(model, latents)
    tokens = frames * height * width
    rows = guidance.summary().rows
    assert len(rows) == ATTENTIONS[name]
    assert all(row.calls == 1 and row.tokens == 2 * tokens for row in rows)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def diffusers_twin(ours: torch.nn.Module) -> torch.nn.Module:
    """diffusers' FLUX with the weights of ComfyUI's."""
    import comfy.utils
    import diffusers

    theirs = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    ).eval()
    weights = ours.state_dict()
    for name, place in comfy.utils.flux_to_diffusers(FLUX).items():
        if name in theirs.state_dict():
            theirs.state_dict()[name].copy_(taken(weights, place))
    return theirs


def run_twin(
    theirs: torch.nn.Module, latents: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor
) -> torch.Tensor:
    """The output of diffusers' FLUX at 0.9, from latents (2, 16, 8, 12) in ComfyUI's order."""
    packed = latents.unflatten(2, (4, 2)).unflatten(4, (6, 2))  # (B, C, h, 2, w, 2)
    packed = packed.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    image_ids = torch.zeros(4, 6, 3)
    image_ids[..., 1] += torch.arange(4)[:, None]
    image_ids[..., 2] += torch.arange(6)
    with torch.inference_mode():
        output: torch.Tensor = theirs(
            hidden_states=packed,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=torch.full((2,), 0.9),
            img_ids=image_ids.flatten(0, 1),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0]
    patches = output.unflatten(1, (4, 6)).unflatten(3, (16, 2, 2))
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(2, 16, 8, 12)


def test_flux_is_guided_as_in_diffusers() -> None:
    """The same weights, latents and settings in both programs give the same output."""
    pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
    comfyui_program.import_comfy()
    import comfy.ops
    from comfy.ldm.flux.model import Flux, FluxParams

    ours = Flux(
        **completed(FluxParams, FLUX), dtype=torch.float32, operations=comfy.ops.manual_cast
    )
    comfyui_program.randomise(ours).eval()
    theirs = diffusers_twin(ours)
    draw = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 16, 8, 12, generator=draw)
    context, pooled = (torch.randn(2, *s, generator=draw) for s in ((5, 32), (24,)))
    config = nf.NegToMeConfig(threshold=0.2, t_end=0)

    def in_comfyui() -> torch.Tensor:
        with torch.inference_mode():
            output: torch.Tensor = ours(latents, torch.full((2,), 0.9), context, pooled)
        return output

    plain = run_twin(theirs, latents, context, pooled)
    torch.testing.assert_close(in_comfyui(), plain, rtol=1e-4, atol=1e-4)
    guidance = Guidance(config)
    guidance.begin_step(900.0)
    with hooked(
        ours, latents, lambda tokens, block: guidance.apply(tokens, block=block, inplace=True)
    ):
        guided = in_comfyui()
    guidance.end_step()
    with nf.negtome_guidance(theirs, config) as handle:
        expected = run_twin(theirs, latents, context, pooled)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)
    assert (guided[1] - in_comfyui()[1]).abs().max() > 0.1
    mine, others = guidance.summary().total, handle.summary().total
    assert (mine.tokens, mine.pushed) == (others.tokens, pytest.approx(others.pushed, abs=0.02))


def taken(weights: dict[str, torch.Tensor], place: Any) -> torch.Tensor:
    """The part of ComfyUI's weights that one of diffusers' names stands for."""
    if isinstance(place, str):
        return weights[place]
    name, part, *function = place
    weight = weights[name] if part is None else weights[name].narrow(*part)
    return function[0](weight) if function else weight


def patched_model() -> Any:
    """A small FLUX model as ComfyUI's loaders return it."""
    comfyui_program.import_comfy()
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.ldm.flux.model import FluxParams

    arguments = completed(FluxParams, FLUX)
    config = comfy.supported_models.FluxSchnell({"image_model": "flux", **arguments})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device="cpu")
    comfyui_program.randomise(model.diffusion_model)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def sampled(model: Any, batch: int = 2, cfg: float = 4.0) -> torch.Tensor:
    import comfy.sample

    draw = torch.Generator().manual_seed(3)
    positive, negative = (
        [[torch.randn(1, 5, 32, generator=draw), {"pooled_output": torch.randn(1, 24)}]]
        for _ in range(2)
    )
    for one in (positive, negative):
        one[0][1]["pooled_output"] = torch.randn(1, 24, generator=draw)
    empty = torch.zeros(batch, 16, 8, 12)
    noise = comfy.sample.prepare_noise(empty, 11)
    settings = {"sampler_name": "euler", "scheduler": "simple", "disable_pbar": True, "seed": 11}
    output: torch.Tensor = comfy.sample.sample(
        model, noise, 3, cfg, positive=positive, negative=negative, latent_image=empty, **settings
    )
    return output


class FakeVae:
    """Means of 8 x 8 pixels, spread over 16 channels."""

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8).mean(1, keepdim=True)
        return means * torch.linspace(-2, 2, 16)[None, :, None, None]


@pytest.mark.parametrize("kind", ["diversity", "avoid"])
def test_halves_in_one_batch_or_one_after_the_other_give_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patched_model()
    settings: dict[str, Any] = {
        "alpha": 0.9,
        "threshold": 0.0,
        "window": "percent",
        "start": 0.0,
        "end": 1.0,
    }
    if kind == "diversity":
        (guided,) = nodes.batch_diversity(model, reference="first", **settings)
    else:
        pictures = torch.rand(3, 64, 96, 3, generator=torch.Generator().manual_seed(4))
        (guided,) = nodes.avoid_image(model, pictures, FakeVae(), **settings)
    plain, together = sampled(model), sampled(guided)
    (guide,) = guides_of(guided)
    joined = guide.guidance.summary()
    assert (joined.forwards, joined.groups) == (3, 2)
    required = type(model.model).memory_required

    def no_room_for_both(self: Any, input_shape: Any, *args: Any, **kwargs: Any) -> float:
        if input_shape[0] > 2:
            return float("inf")
        return float(required(self, input_shape, *args, **kwargs))

    monkeypatch.setattr(type(model.model), "memory_required", no_room_for_both)
    apart = sampled(guided)
    split = guide.guidance.summary()
    assert (split.forwards, split.groups) == (6, 1)
    assert split.total.tokens == joined.total.tokens
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-3)
    assert (apart - plain).abs().max() > 0.05
    if kind == "diversity":
        torch.testing.assert_close(apart[0], plain[0], rtol=1e-3, atol=1e-3)


def test_a_compiled_model_and_an_unknown_one_are_refused() -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = patched_model()
    settings = {"alpha": 0.9, "threshold": 0.0, "window": "percent", "start": 0.0, "end": 1.0}
    (guided,) = nodes.batch_diversity(model, reference="first", **settings)
    set_torch_compile_wrapper(guided, backend="eager")
    with pytest.raises(ValueError, match="compiled by a node"):
        sampled(guided)
    model.model.diffusion_model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="where the image tokens of Linear are"):
        nodes.batch_diversity(model, reference="first", **settings)


def test_an_error_in_a_forward_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched_model()
    before = sampled(model)
    settings = {"alpha": 0.9, "threshold": 0.0, "window": "percent", "start": 0.0, "end": 1.0}
    (guided,) = nodes.batch_diversity(model, reference="others", **settings)
    with pytest.raises(ValueError, match="others"):
        sampled(guided, batch=1)
    flux = model.model.diffusion_model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in flux.modules())
    assert torch.equal(sampled(model), before)
    assert not torch.equal(sampled(guided), before)
