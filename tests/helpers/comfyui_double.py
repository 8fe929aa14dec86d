"""Doubles of ComfyUI's patchers, wrappers, block patches and sampler, in a few lines.

The real ones are in `comfy.model_patcher`, `comfy.patcher_extension`, `comfy.samplers` and
`comfy.model_base` of ComfyUI 0.3.64; the tests of the real program hold this double to them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
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


class UNetModel(nn.Module):
    """Latents (B, 4, H, W); attentions whose outputs go through the patches."""

    def __init__(self, temporal: bool = False) -> None:
        super().__init__()
        self.inputs, self.outputs = linear(4, CHANNELS, 0), linear(CHANNELS, 4, 1)
        self.attention = linear(CHANNELS, CHANNELS, 2)

    def forward(self, x: torch.Tensor, context: torch.Tensor, options: dict[str, Any]) -> Any:
        tokens = self.inputs(x.flatten(2).mT)
        extra = {name: value for name, value in options.items() if name != "patches"}
        extra |= {"block": ("output", 3), "block_index": 0, "activations_shape": list(x.shape)}
        for kind in ("attn1", "attn2"):
            attended = self.attention(tokens) + context.mean(1, keepdim=True)
            for patch in options.get("patches", {}).get(f"{kind}_output_patch", []):
                attended = patch(attended, extra)
            tokens = tokens + attended
        return self.outputs(tokens).mT.reshape(x.shape)


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

    def forward(self, x: torch.Tensor, context: torch.Tensor, options: dict[str, Any]) -> Any:
        patches = nn.functional.pixel_unshuffle(x, 2)
        image = self.inputs(patches.flatten(2).mT)
        image = image + self.double_blocks[0].img_attn.proj(image + context.mean(1, keepdim=True))
        joint = torch.cat([context, image], dim=1)
        joint = joint + self.single_blocks[0].linear2(torch.cat([joint, joint, joint], dim=2))
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


class BaseModel:
    """Double of `ModelPatcher.model` that counts its forwards."""

    def __init__(self, diffusion_model: nn.Module, temporal: bool = False) -> None:
        self.diffusion_model = diffusion_model
        self.model_sampling = Sampling()
        config = {"use_temporal_attention": temporal}
        self.model_config = SimpleNamespace(unet_config=config)
        self.forwards: list[int] = []

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
        by_key = transformer_options["wrappers"].get("apply_model", {})
        wrappers = [one for of_key in by_key.values() for one in of_key]
        executor = Executor(self._apply_model, self, wrappers)
        output: torch.Tensor = executor.execute(
            x, t, c_concat, c_crossattn, control, transformer_options, **kwargs
        )
        return output

    def _apply_model(
        self, x: Any, t: Any, c_concat: Any, c_crossattn: Any, control: Any, options: Any
    ) -> torch.Tensor:
        self.forwards.append(len(x))
        assert len(x) == len(t) == len(c_crossattn)
        output = self.diffusion_model(x, c_crossattn, options)
        return x - output * t[:, None, None, None]


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

    def _patch(self, name: str, patch: Any) -> None:
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches[name] = [*patches.get(name, []), patch]

    def set_model_attn1_output_patch(self, patch: Any) -> None:
        self._patch("attn1_output_patch", patch)

    def set_model_attn2_output_patch(self, patch: Any) -> None:
        self._patch("attn2_output_patch", patch)


class Guider:
    """Double of `CFGGuider`: 4 Euler steps with a scale of 2, from sigma 1 to 0."""

    def __init__(self, patcher: ModelPatcher, joined: bool, seed: int) -> None:
        self.model_patcher, self.joined = patcher, joined
        draw = torch.Generator().manual_seed(seed + 100)
        self.conditions = torch.randn(2, TEXT, CHANNELS, generator=draw)

    def outer_sample(self, noise: torch.Tensor, latent_image: Any, seed: Any = None) -> Any:
        x, batch = noise, len(noise)
        for sigma in (1.0, 0.75, 0.5, 0.25):
            chunks = [[1, 0]] if self.joined else [[0], [1]]
            found = {}
            for chunk in chunks:
                options = dict(self.model_patcher.model_options["transformer_options"])
                options |= {"wrappers": self.model_patcher.wrappers, "cond_or_uncond": chunk}
                context = torch.cat([self.conditions[[i]].expand(batch, -1, -1) for i in chunk])
                output = self.model_patcher.model.apply_model(
                    torch.cat([x] * len(chunk)),
                    torch.full((batch * len(chunk),), sigma),
                    c_crossattn=context,
                    transformer_options=options,
                )
                found |= dict(zip(chunk, output.chunk(len(chunk)), strict=True))
            denoised = found[1] + 2 * (found[0] - found[1])
            x = x + (x - denoised) / sigma * -0.25
        return x


def sample(patcher: ModelPatcher, batch: int, joined: bool = True, seed: int = 0) -> torch.Tensor:
    """Latents (batch, 4, 8, 12) of a run whose halves are in one forward, or in one each."""
    guider = Guider(patcher, joined, seed)
    wrappers = [w for k in patcher.wrappers.get("outer_sample", {}).values() for w in k]
    noise = torch.randn(batch, 4, 8, 12, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        executor = Executor(guider.outer_sample, guider, wrappers)
        output: torch.Tensor = executor.execute(noise, None, seed=seed)
    return output


class Vae:
    """Means of 8 x 8 pixels, as 4 channels."""

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        means = nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([means, means[:, :1]], dim=1) * 4 - 2
