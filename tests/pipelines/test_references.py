"""References from outside of the batch, on whole diffusers pipelines with tiny random models."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
from diffusers import EulerAncestralDiscreteScheduler

from helpers.pipelines_fixtures import (
    ALWAYS,
    FAMILIES,
    built,
    denoiser,
    flux_pipeline,
    generate,
    reference_latents,
    sd_pipeline,
)
from negtome_fast import Reference
from negtome_fast.config import NegToMeConfig
from negtome_fast.guidance_step import GuidanceStep
from negtome_fast.pipelines import apply_negtome, negtome_guidance
from negtome_fast.pipelines.references import draw_noise


class DenoiserRecord:
    """Records the denoiser's latents and outputs in each forward of the run's items."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.latents: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __enter__(self) -> DenoiserRecord:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.latents.append(args[0] if args else kwargs["hidden_states"])

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.outputs.append(output[0])

        model = denoiser(self._pipe)
        self._hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def predictions(pipe: Any, images: int = 4, **arguments: Any) -> list[Tensor]:
    """The denoiser's outputs in the first step."""
    with DenoiserRecord(pipe) as record:
        generate(pipe, images, steps=1, **arguments)
    return record.outputs


def first_latents(pipe: Any, **arguments: Any) -> Tensor:
    """The first item's latents in the first step, before the scheduler scales them."""
    with DenoiserRecord(pipe) as record:
        generate(pipe, steps=1, **arguments)
    sigma = pipe.scheduler.sigmas[0] if type(pipe.scheduler).__name__.startswith("Euler") else 0.0
    return record.latents[0][:1] * (sigma**2 + 1) ** 0.5


@pytest.fixture
def exact() -> Iterator[None]:
    """In fp64 a batch of another size rounds too little to decide between two equal tokens."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_default_device_of_the_caller_changes_nothing(flux: Any) -> None:
    clean = [torch.zeros(1, 4, 2, 3)]
    (expected,) = draw_noise(clean, torch.Generator().manual_seed(3))
    with torch.device("meta"):
        (noise,) = draw_noise(clean, torch.Generator().manual_seed(3))
        handle = apply_negtome(flux, ALWAYS, reference="others")
    assert torch.equal(noise, expected)
    generate(flux, 2)
    handle.remove()
    assert handle.summary().total.pushed > 0


@pytest.mark.parametrize("cfg", [False, True], ids=["plain", "cfg"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("exact")
def test_the_first_image_given_as_a_reference_guides_as_it_does_in_the_batch(
    name: str, cfg: bool
) -> None:
    pipe = FAMILIES[name]()
    reference = Reference(first_latents(pipe), noise=False)
    with negtome_guidance(pipe, ALWAYS) as inside:
        expected = predictions(pipe, cfg=cfg)
    with negtome_guidance(pipe, ALWAYS, reference=reference) as outside:
        guided = predictions(pipe, cfg=cfg)
    for one, other, plain in zip(guided, expected, predictions(pipe, cfg=cfg), strict=True):
        # In the batch, the first item of each half is the reference and stays as it is.
        others = [i for i in range(len(one)) if i % 4]
        torch.testing.assert_close(one[others], other[others], atol=1e-6, rtol=1e-6)
        assert (other[others] - plain[others]).abs().max() > 1e-3
    counted = [(r.block, r.grid, r.calls) for r in inside.summary().rows]
    assert [(r.block, r.grid, r.calls) for r in outside.summary().rows] == counted
    assert outside.summary().forwards == inside.summary().forwards


@pytest.mark.parametrize("cfg", [False, True], ids=["plain", "cfg"])
def test_one_image_alone_is_guided_and_removal_restores(family: str, cfg: bool) -> None:
    pipe = built(family)
    before = generate(pipe, 1, cfg=cfg)
    reference = Reference(reference_latents(pipe))
    handle = apply_negtome(pipe, ALWAYS, reference=reference)
    guided = generate(pipe, 1, cfg=cfg)
    assert torch.equal(generate(pipe, 1, cfg=cfg), guided)
    handle.remove()
    assert not torch.equal(guided, before)
    assert torch.equal(generate(pipe, 1, cfg=cfg), before)
    summary = handle.summary()
    assert summary.groups == (2 if cfg and family != "flux" else 1)
    assert summary.forwards == summary.guided == (8 if cfg and family == "flux" else 4)
    assert sorted(row.block for row in summary.rows) == sorted(handle.blocks)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "dropout"])
def test_alpha_zero_is_bit_identical_with_the_callers_random_numbers(training: bool) -> None:
    """Also in a scheduler that adds noise, and in a model that draws some itself."""
    pipe = sd_pipeline()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    for module in pipe.unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    pipe.unet.train(training)
    runs, states = [], []
    for guided in (False, True):
        torch.manual_seed(5)
        with ExitStack() as stack:
            if guided:
                reference = [Reference(reference_latents(pipe), alpha=0) for _ in range(2)]
                handle = stack.enter_context(negtome_guidance(pipe, ALWAYS, reference=reference))
            runs.append(generate(pipe, 2))
        states.append(torch.get_rng_state())
    assert torch.equal(*runs) and torch.equal(*states)
    assert handle.summary().total.matched > 0.5


class Recorded:
    """The arguments of each call of the denoiser's forward, the references' among them."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        cls = type(denoiser(pipe))
        forward, signature = cls.forward, inspect.signature(cls.forward)

        @functools.wraps(forward)  # a function of another name would be taken for a step cache
        def record(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(dict(signature.bind(*args, **kwargs).arguments))
            return forward(*args, **kwargs)

        monkeypatch.setattr(cls, "forward", record)


def latents_of(call: dict[str, Any]) -> Tensor:
    return call["hidden_states"] if "hidden_states" in call else call["sample"]


@pytest.mark.parametrize("noise", [True, False], ids=["noised", "clean"])
def test_the_reference_is_noised_by_the_rule_of_its_scheduler(
    family: str, noise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The closed forms of flow matching, DDIM and Euler; the noise is one for the whole run."""
    pipe = built(family)
    clean = reference_latents(pipe)
    recorded = Recorded(pipe, monkeypatch)
    with negtome_guidance(pipe, ALWAYS, reference=Reference(clean, noise=noise)):
        generate(pipe, 1, steps=3)
    scheduler, noises = pipe.scheduler, []
    for step, call in enumerate(recorded.calls[::2]):
        given = latents_of(call)
        if family == "sd15":
            level = scheduler.alphas_cumprod[scheduler.timesteps[step]]
            signal, scale = level.sqrt(), (1 - level).sqrt()
        elif family == "sdxl":
            sigma = scheduler.sigmas[step]
            signal = 1 / (sigma**2 + 1).sqrt()
            scale = sigma * signal
        else:
            signal, scale = 1 - scheduler.sigmas[step], scheduler.sigmas[step]
        if noise:
            noises.append((given - signal * clean) / scale)
        else:
            expected = clean * signal if family == "sdxl" else clean
            torch.testing.assert_close(given, expected)
    for drawn in noises:
        torch.testing.assert_close(drawn, noises[0], atol=1e-4, rtol=1e-4)
        assert abs(drawn.mean()) < 0.2 and abs(drawn.std() - 1) < 0.2
    assert len(recorded.calls) == 6


def test_the_noise_follows_the_callers_seed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = built(family)
    recorded = Recorded(pipe, monkeypatch)
    two = [Reference(reference_latents(pipe)), Reference(reference_latents(pipe))]
    with negtome_guidance(pipe, ALWAYS, reference=two):
        for seed in (7, 7, 8):
            generate(pipe, 2, steps=1, latent_seed=seed)
    first, again, other = (latents_of(call) for call in recorded.calls[::2])
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_the_reference_is_seen_in_the_conditioning_of_each_group(
    sdxl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(sdxl, monkeypatch)
    two = [Reference(reference_latents(sdxl, seed), noise=False) for seed in (1, 2)]
    with negtome_guidance(sdxl, ALWAYS, reference=two):
        generate(sdxl, 3, steps=1, cfg=True)
    reference, run = recorded.calls
    rows = [0, 0, 3, 3]  # two references in the unconditional part, and in the conditional one
    assert torch.equal(reference["encoder_hidden_states"], run["encoder_hidden_states"][rows])
    for name, value in run["added_cond_kwargs"].items():
        assert torch.equal(reference["added_cond_kwargs"][name], value[rows])
    sample = reference["sample"]
    assert torch.equal(sample[:2], sample[2:]) and not torch.equal(sample[0], sample[1])


@pytest.mark.usefixtures("exact")
def test_references_are_recorded_in_as_many_passes_as_the_batch_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = flux_pipeline()
    three = [Reference(reference_latents(pipe, seed)) for seed in range(3)]
    recorded = Recorded(pipe, monkeypatch)
    guided = []
    for images in (1, 2, 4):
        with negtome_guidance(pipe, ALWAYS, reference=three) as handle:
            guided.append(predictions(pipe, images)[0][:1])
        assert handle.summary().forwards == 1
    assert [len(latents_of(call)) for call in recorded.calls] == [1, 1, 1, 1, 2, 1, 2, 3, 4]
    for other in guided[1:]:
        torch.testing.assert_close(other, guided[0], atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("exact")
def test_several_references_are_their_union() -> None:
    """A reference that is nowhere the nearest, or that is there twice, changes nothing."""
    pipe = flux_pipeline()
    one, other = (Reference(reference_latents(pipe, seed)) for seed in (1, 2))

    def guided(*references: Reference, **settings: Any) -> Tensor:
        with negtome_guidance(pipe, ALWAYS, reference=references, **settings):
            return predictions(pipe, 1, size=(64, 96))[0]

    clean = replace(one, noise=False)
    torch.testing.assert_close(guided(clean, clean), guided(clean), atol=1e-6, rtol=1e-6)
    twice = guided(replace(clean, alpha=1.8))
    both = guided(clean, clean, combine="sum")
    torch.testing.assert_close(both, twice, atol=1e-6, rtol=1e-6)
    union = guided(one, other)
    assert all((union - guided(r)).abs().max() > 1e-3 for r in (one, other))
    never = replace(other, threshold=1.0)
    torch.testing.assert_close(
        guided(one, never, combine="sum"), guided(one, combine="sum"), atol=1e-6, rtol=1e-6
    )


def test_official_matching_takes_references_of_the_size_of_the_run(family: str) -> None:
    pipe = built(family)
    reference = Reference(reference_latents(pipe))
    with negtome_guidance(pipe, ALWAYS, reference=reference, matching="official"):
        official = generate(pipe, 1)
    with negtome_guidance(pipe, ALWAYS, reference=reference):
        assert not torch.equal(generate(pipe, 1), official)


def test_a_mask_is_applied_at_every_grid(sdxl: Any) -> None:
    """Pulled all the way, every token becomes one of the reference's that the mask allows."""
    mask = np.zeros((30, 50), dtype=bool)
    mask[:, 30:] = True  # from 60% of the width: column 7.2 of 12, and 3.6 of 6
    kept: dict[str, Tensor] = {}
    replaced: dict[str, Tensor] = {}
    names = {module: name for name, module in sdxl.unet.named_modules()}
    settings = {"threshold": -1, "t_end": 0, "blocks": "*.attn1"}
    reference = Reference(reference_latents(sdxl), mask=mask, alpha=-1)
    handle = apply_negtome(sdxl, NegToMeConfig(**settings), reference=reference)

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        seen = kept if handle.guidance.recording else replaced
        seen[names[module]] = output.clone()

    hooks = [m.register_forward_hook(look) for m, n in names.items() if n.endswith("attn1")]
    generate(sdxl, 1, steps=1)
    for hook in hooks:
        hook.remove()
    handle.remove()
    chosen = set()
    for name, tokens in replaced.items():
        width = {96: 12, 24: 6}[tokens.shape[1]]
        distance, nearest = (tokens[0][:, None] - kept[name][0]).norm(dim=2).min(dim=1)
        assert distance.max() < 1e-5
        assert (nearest % width).min() >= {12: 7, 6: 4}[width]
        chosen.update((width, token) for token in nearest.tolist())
    assert {width for width, _ in chosen} == {12, 6} and len(chosen) > 4


def test_a_mask_that_leaves_no_token_says_so(flux: Any) -> None:
    mask = np.zeros((64, 96), dtype=np.uint8)
    mask[:3, :3] = 255  # tokens are 16 x 16 pixels
    reference = Reference(reference_latents(flux), mask=np.stack([mask] * 3, axis=2))
    with (
        negtome_guidance(flux, ALWAYS, reference=reference),
        pytest.raises(ValueError, match=r"mask of reference 0 .* 4 x 6"),
    ):
        generate(flux, 1)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_references_forward_leaves_no_trace(
    family: str, error: type[BaseException]
) -> None:
    pipe = built(family)
    before = generate(pipe, 1)
    reference = Reference(reference_latents(pipe))
    handle = apply_negtome(pipe, ALWAYS, reference=reference)
    guided = generate(pipe, 1)

    def fail(*_: Any) -> None:
        if handle.guidance.recording:
            raise error("stop")

    block = [m for m in denoiser(pipe).modules() if type(m).__name__ == "FeedForward"][-1]
    hook = block.register_forward_hook(fail)
    with pytest.raises(error, match="stop"):
        generate(pipe, 1)
    hook.remove()
    assert torch.equal(generate(pipe, 1), guided)
    handle.remove()
    assert torch.equal(generate(pipe, 1), before)


def test_the_tokens_are_freed_after_the_forward(flux: Any) -> None:
    kept: list[weakref.ref[Tensor]] = []
    original = GuidanceStep.keep_reference

    def keep(self: GuidanceStep, tokens: Tensor, block: str, references: int) -> None:
        original(self, tokens, block, references)
        kept.append(weakref.ref(self.reference_tokens[block][-1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuidanceStep, "keep_reference", keep)
        with negtome_guidance(flux, ALWAYS, reference=Reference(reference_latents(flux))):
            generate(flux, 1, steps=1)
            assert len(kept) == 4 and all(tokens() is None for tokens in kept)


@pytest.mark.parametrize(
    ("images", "size", "shape"),
    [(1, (64, 96), (1, 24, 16)), (2, (32, 48), (1, 6, 16)), (1, (64, 96), (24, 16))],
    ids=str,
)
def test_size_and_batch_may_change_between_runs(
    flux: Any, images: int, size: tuple[int, int], shape: tuple[int, ...]
) -> None:
    """Latents fit one size only, here the second run's."""
    with negtome_guidance(flux, ALWAYS, reference=Reference(torch.randn(shape))) as handle:
        with pytest.raises(ValueError, match=r"reference 0 .* do not fit .*\(1, 16, 16\)"):
            generate(flux, 1, size=(64, 64))
        generate(flux, images, size=size)
    assert handle.summary().rows


def test_a_compiled_model_takes_references_like_another() -> None:
    pipe = flux_pipeline()
    reference = Reference(reference_latents(pipe))
    with negtome_guidance(built("flux"), ALWAYS, reference=reference):
        expected = generate(built("flux"), 1, steps=1)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    try:
        with negtome_guidance(pipe, ALWAYS, reference=reference):
            torch.testing.assert_close(generate(pipe, 1, steps=1), expected)
    finally:
        torch.compiler.reset()


def test_offloaded_weights_are_there_for_the_references() -> None:
    accelerate = pytest.importorskip("accelerate", reason='the extra "diffusers" is not installed')
    pipe = flux_pipeline()
    reference = Reference(reference_latents(pipe))
    with negtome_guidance(pipe, ALWAYS, reference=reference):
        expected = generate(pipe, 1)
    accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    assert next(pipe.transformer.parameters()).is_meta
    with negtome_guidance(pipe, ALWAYS, reference=reference):
        assert torch.equal(generate(pipe, 1), expected)


def test_a_deep_copy_takes_its_references_along() -> None:
    pipe = flux_pipeline()
    apply_negtome(pipe, ALWAYS, reference=Reference(reference_latents(pipe)))
    guided = generate(pipe, 1)
    assert torch.equal(generate(copy.deepcopy(pipe), 1), guided)
