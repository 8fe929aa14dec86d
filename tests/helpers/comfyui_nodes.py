"""Doubles of other node packs' nodes, as far as they change what a guided model runs.

The originals: HyperTile, TomePatchModel, EasyCache and LazyCache of ComfyUI's `comfy_extras`;
TeaCache, First Block Cache, tiled diffusion and negative attention guidance of node packs.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from helpers.comfyui_double import ModelPatcher


def hypertile(patcher: ModelPatcher) -> ModelPatcher:
    """Self-attention within four tiles, which are items of its batch."""
    tiled = patcher.clone()

    def cut(q: torch.Tensor, k: Any, v: Any, options: dict[str, Any]) -> Any:
        height, width = options["activations_shape"][-2:]
        tiles = q.unflatten(1, (2, height // 2, 2, width // 2)).permute(0, 1, 3, 2, 4, 5)
        return tiles.flatten(3, 4).flatten(0, 2), k, v

    def join(out: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        height, width = options["activations_shape"][-2:]
        tiles = out.unflatten(0, (-1, 2, 2)).unflatten(3, (height // 2, width // 2))
        return tiles.permute(0, 1, 3, 2, 4, 5).flatten(1, 4)

    tiled.set_model_attn1_patch(cut)
    tiled.set_model_attn1_output_patch(join)
    return tiled


def token_merging(patcher: ModelPatcher) -> ModelPatcher:
    """Self-attention of every second token, whose outputs are then repeated."""
    merged = patcher.clone()
    merged.set_model_attn1_patch(lambda q, k, v, options: (q[:, ::2], k, v))
    merged.set_model_attn1_output_patch(lambda out, options: out.repeat_interleave(2, dim=1))
    return merged


def lazy_cache(patcher: ModelPatcher, key: str = "lazycache") -> ModelPatcher:
    """Every second step repeats the change of the step before it."""
    cached = patcher.clone()
    kept: list[torch.Tensor] = []

    def predict_noise(executor: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        if kept:
            return x + kept.pop()
        output: torch.Tensor = executor(x, *args)
        kept.append(output - x)
        return output

    predict_noise.__qualname__ = f"{key}_wrapper"
    cached.add_wrapper_with_key("predict_noise", key, predict_noise)
    return cached


class SecondForwardSkipped:
    """A wrapper of the model's function in which every second forward repeats the one before it.

    The blocks are replaced inside of the model's forward, so that all that is outside runs.
    """

    def __init__(self, model: nn.Module, first: int = 1) -> None:
        self.model, self.count, self.first = model, 0, first
        self.kept: torch.Tensor | None = None

    def __call__(self, model_function: Any, given: dict[str, Any]) -> Any:
        self.count += 1
        original = type(self.model).forward

        def forward(model: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.kept is None or self.count < self.first or self.count % 2:
                self.kept = original(model, x, *args, **kwargs) - x
            return x + self.kept

        self.model.forward = MethodType(forward, self.model)
        try:
            return model_function(given["input"], given["timestep"], **given["c"])
        finally:
            del self.model.forward


def skipping(patcher: ModelPatcher, first: int = 1) -> ModelPatcher:
    skipped = patcher.clone()
    model = patcher.model.diffusion_model
    skipped.set_model_unet_function_wrapper(SecondForwardSkipped(model, first))
    return skipped


def tiled_diffusion(patcher: ModelPatcher) -> ModelPatcher:
    """The model sees two halves of each latent, as items of one batch."""
    tiled = patcher.clone()

    def wrapper(model_function: Any, given: dict[str, Any]) -> torch.Tensor:
        halves = torch.cat(given["input"].chunk(2, dim=2))
        twice = {**given["c"], "c_crossattn": torch.cat([given["c"]["c_crossattn"]] * 2)}
        output = model_function(halves, torch.cat([given["timestep"]] * 2), **twice)
        return torch.cat(output.chunk(2), dim=2)

    tiled.set_model_unet_function_wrapper(wrapper)
    return tiled


def negative_attention(flux: nn.Module) -> None:
    """The single blocks also see the image with a negative text, as more items of the batch."""
    single = flux.single_blocks[0].linear2
    original = single.forward

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        positive, negative = original(inputs).chunk(2)
        return positive * 2 - negative

    single.register_forward_pre_hook(lambda _, given: (torch.cat([given[0], given[0]]),))
    single.forward = forward
