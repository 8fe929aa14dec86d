"""Doubles of ComfyUI's patchers, wrappers, block patches and sampler, in a few lines.

The real ones are in `comfy.model_patcher`, `comfy.patcher_extension`, `comfy.samplers` and
`comfy.model_base` of ComfyUI 0.3.64; the tests of the real program hold this double to them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

CHANNELS, TEXT = 16, 3


class Sampling:
    """Flow matching, as `ModelSamplingDiscreteFlow` with a shift of 1."""

    sigma_max = torch.tensor(1.0)

    def percent_to_sigma(self, percent: float) -> float:
        return 1.0 - percent

    def noise_scaling(
        self, sigma: torch.Tensor, noise: torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor:
        return sigma * noise + (1 - sigma) * latents


def linear(inputs: int, outputs: int, seed: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    drawn = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    layer.weight.data = drawn / inputs**0.5
    return layer


class Attended(nn.Identity):
    """The output (B, S, D) of one attention, before its output projection, for who observes it."""


class UNetModel(nn.Module):
    """Latents (B, 4, H, W); attentions whose outputs go through the patches.

    Each of the levels has half the height and width of the one before.
    """

    def __init__(self, levels: int = 1) -> None:
        super().__init__()
        self.inputs, self.outputs = linear(4, CHANNELS, 0), linear(CHANNELS, 4, 1)
        self.attention, self.levels = linear(CHANNELS, CHANNELS, 2), levels
        self.attended = nn.ModuleList(Attended() for _ in range(2 * levels))

    def forward(self, x: torch.Tensor, context: torch.Tensor, options: dict[str, Any]) -> Any:
        image = self.inputs(x.movedim(1, -1)).movedim(-1, 1)
        for level in range(self.levels):
            small = nn.functional.avg_pool2d(image, 2**level) if level else image
            tokens = self._block(small, x, context, options, level)
            small = tokens.mT.reshape(small.shape)
            image = nn.functional.interpolate(small, x.shape[-2:]) if level else small
        return self.outputs(image.movedim(1, -1)).movedim(-1, 1)

    def _block(
        self, image: Any, x: Any, context: Any, options: dict[str, Any], level: int
    ) -> torch.Tensor:
        tokens, patches = image.flatten(2).mT, options.get("patches", {})
        extra = {name: value for name, value in options.items() if name != "patches"}
        extra |= {"block": ("output", 3 + level), "block_index": 0}
        extra |= {"activations_shape": list(image.shape), "original_shape": list(x.shape)}
        for number, kind in enumerate(("attn1", "attn2")):
            query = tokens
            for patch in patches.get(f"{kind}_patch", []):
                query, _, _ = patch(query, query, query, extra)
            attended = self.attention(self.attended[2 * level + number](query))
            if kind == "attn2":
                attended = attended + context.mean(1, keepdim=True)
            for patch in patches.get(f"{kind}_output_patch", []):
                attended = patch(attended, extra)
            tokens = tokens + attended
        return tokens


class Flux(nn.Module):
    """Latents (B, 4, H, W) in patches of 2; one double and one single block of FLUX's names."""

    patch_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.outputs = linear(16, CHANNELS, 0), linear(CHANNELS, 16, 1)
        double, single = nn.Module(), nn.Module()
        double.img_attn = nn.Module()
        double.img_attn.proj = linear(CHANNELS, CHANNELS, 2)
        single.linear2 = linear(3 * CHANNELS, CHANNELS, 3)
        self.double_blocks, self.single_blocks = nn.ModuleList([double]), nn.ModuleList([single])
        self.attended = nn.ModuleList([Attended(), Attended()])

    def forward(self, x: torch.Tensor, context: torch.Tensor, options: dict[str, Any]) -> Any:
        patches = nn.functional.pixel_unshuffle(x, 2)
        image = self.inputs(patches.flatten(2).mT)
        joint = self.attended[0](torch.cat([context, image], dim=1))
        attended = joint[:, context.shape[1] :] + context.mean(1, keepdim=True)
        image = image + self.double_blocks[0].img_attn.proj(attended)
        joint = torch.cat([context, image], dim=1)
        wide = torch.cat([self.attended[1](joint), joint, joint], dim=2)
        joint = joint + self.single_blocks[0].linear2(wide)
        image = self.outputs(joint[:, context.shape[1] :])
        return nn.functional.pixel_shuffle(image.mT.reshape(patches.shape), 2)


class Executor:
    """Calls one wrapper after the other, and then the original."""

    def __init__(self, original: Callable[..., Any], owner: Any, wrappers: Sequence[Any]) -> None:
        self.original, self.class_obj, self._wrappers = original, owner, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Executor(self.original, self.class_obj, self._wrappers[1:]).execute(*args, **kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if not self._wrappers:
            return self.original(*args, **kwargs)
        return self._wrappers[0](self, *args, **kwargs)


@dataclass
class Forward:
    """One call of a diffusion model: its arguments, and its output."""

    x: torch.Tensor
    sigma: float
    context: torch.Tensor
    given: dict[str, Any]
    output: torch.Tensor


class BaseModel:
    """Double of `ModelPatcher.model` that keeps its forwards."""

    def __init__(self, diffusion_model: nn.Module, temporal: bool = False) -> None:
        self.diffusion_model = diffusion_model
        self.model_sampling = Sampling()
        config = {"use_temporal_attention": temporal}
        self.model_config = SimpleNamespace(unet_config=config)
        self.forwards: list[int] = []
        self.kept: list[Forward] = []

    def process_latent_in(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def apply_model(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        wrappers = _listed(transformer_options["wrappers"], "apply_model")
        executor = Executor(self._apply_model, self, wrappers)
        output: torch.Tensor = executor.execute(
            x, t, c_concat, c_crossattn, control, transformer_options, **kwargs
        )
        return output

    def _apply_model(
        self,
        x: Any,
        t: Any,
        c_concat: Any,
        c_crossattn: Any,
        control: Any,
        options: Any,
        **given: Any,
    ) -> torch.Tensor:
        self.forwards.append(len(x))
        assert len(x) == len(t) == len(c_crossattn)
        output = self.diffusion_model(x, c_crossattn, options, **given)
        self.kept.append(Forward(x, float(t[0]), c_crossattn, given, output))
        return x - output * t.reshape(-1, *[1] * (x.ndim - 1))


class ModelPatcher:
    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.object_patches: dict[str, Any] = {}

    def clone(self) -> ModelPatcher:
        clone = ModelPatcher(self.model)
        clone.model_options = copy.deepcopy(self.model_options)
        clone.object_patches = dict(self.object_patches)
        for kind, by_key in self.wrappers.items():
            clone.wrappers[kind] = {key: list(of_key) for key, of_key in by_key.items()}
        return clone

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def get_wrappers(self, kind: str, key: str) -> list[Any]:
        return self.wrappers.get(kind, {}).get(key, [])

    def get_model_object(self, name: str) -> Any:
        return self.object_patches.get(name) or getattr(self.model, name)

    def set_model_unet_function_wrapper(self, function: Any) -> None:
        self.model_options["model_function_wrapper"] = function

    def _patch(self, name: str, patch: Any) -> None:
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches[name] = [*patches.get(name, []), patch]

    def set_model_attn1_patch(self, patch: Any) -> None:
        self._patch("attn1_patch", patch)

    def set_model_attn1_output_patch(self, patch: Any) -> None:
        self._patch("attn1_output_patch", patch)

    def set_model_attn2_output_patch(self, patch: Any) -> None:
        self._patch("attn2_output_patch", patch)


class Guider:
    """Double of `CFGGuider`: Euler steps with a scale of 2.

    Args:
        patcher: the model.
        conditions: conditional and unconditional texts, (b, T, D) each; ComfyUI repeats b rows
            until there is one for each image.
        joined: both are in one forward, or in one each.
        given: more arguments of the diffusion model.
    """

    def __init__(
        self,
        patcher: ModelPatcher,
        conditions: Sequence[torch.Tensor],
        joined: bool,
        given: dict[str, Any],
    ) -> None:
        self.model_patcher, self.joined, self.given = patcher, joined, given
        self.texts = conditions
        self.conds = {
            name: [{"cross_attn": text, "model_conds": {}}]
            for name, text in zip(("positive", "negative"), conditions, strict=True)
        }
        self.model_options = copy.copy(patcher.model_options)

    def outer_sample(
        self,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        sampler: Any,
        sigmas: torch.Tensor,
        denoise_mask: Any = None,
        callback: Any = None,
        disable_pbar: bool = False,
        seed: Any = None,
    ) -> Any:
        schedule = sigmas.tolist()
        x = Sampling().noise_scaling(sigmas[0], noise, latent_image)
        wrappers = _listed(self.model_patcher.wrappers, "predict_noise")
        for sigma, after in pairwise(schedule):
            executor = Executor(self.predict_noise, self, wrappers)
            denoised = executor.execute(x, torch.tensor(sigma), self.model_options)
            x = x + (x - denoised) / sigma * (after - sigma)
        return x

    def predict_noise(self, x: Any, sigma: Any, model_options: Any) -> torch.Tensor:
        batch, found = len(x), {}
        for chunk in [[1, 0]] if self.joined else [[0], [1]]:
            options = dict(model_options["transformer_options"])
            options |= {"wrappers": self.model_patcher.wrappers, "cond_or_uncond": chunk}
            texts = [self.texts[i][torch.arange(batch) % len(self.texts[i])] for i in chunk]
            given = {name: _repeated(value, len(chunk)) for name, value in self.given.items()}
            arguments = {
                "c_crossattn": torch.cat(texts),
                "transformer_options": options,
                **given,
            }
            apply_model = self.model_patcher.model.apply_model
            inputs = torch.cat([x] * len(chunk)), sigma.expand(batch * len(chunk))
            wrapper = model_options.get("model_function_wrapper")
            if wrapper is None:
                output = apply_model(*inputs, **arguments)
            else:
                names = {"input": inputs[0], "timestep": inputs[1], "c": arguments}
                output = wrapper(apply_model, {**names, "cond_or_uncond": chunk})
            found |= dict(zip(chunk, output.chunk(len(chunk)), strict=True))
        return found[1] + 2 * (found[0] - found[1])


def _listed(wrappers: dict[str, dict[str, list[Any]]], kind: str) -> list[Any]:
    return [one for of_key in wrappers.get(kind, {}).values() for one in of_key]


def _repeated(value: Any, times: int) -> Any:
    return [torch.cat([one] * times) for one in value] if isinstance(value, list) else value


SIGMAS = (1.0, 0.75, 0.5, 0.25, 0.0)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(
    patcher: ModelPatcher,
    batch: int,
    joined: bool = True,
    seed: int = 0,
    *,
    noise: torch.Tensor | None = None,
    latents: torch.Tensor | None = None,
    sigmas: Sequence[float] = SIGMAS,
    texts: Sequence[torch.Tensor] | None = None,
    **given: Any,
) -> torch.Tensor:
    """Latents (batch, 4, 8, 12) of a run whose halves are in one forward, or in one each."""
    texts = draw(2, TEXT, CHANNELS, seed=seed + 100).split(1) if texts is None else texts
    guider = Guider(patcher, texts, joined, given)
    noise = draw(batch, 4, 8, 12, seed=seed) if noise is None else noise
    latents = torch.zeros_like(noise) if latents is None else latents
    with torch.inference_mode():
        executor = Executor(guider.outer_sample, guider, _listed(patcher.wrappers, "outer_sample"))
        output: torch.Tensor = executor.execute(
            noise, latents, None, torch.tensor(sigmas), None, None, False, seed
        )
    return output


class Vae:
    """Means of 8 x 8 pixels, as 4 channels."""

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        means = nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([means, means[:, :1]], dim=1) * 4 - 2
