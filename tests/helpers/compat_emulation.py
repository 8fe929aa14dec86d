"""The authors' placement as hooks around their definition in fp64.

It shares no code with the package's hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from helpers.compat_definition import authors_definition
from helpers.pipelines_fixtures import TEXT, flux_pipeline, sdxl_pipeline
from negtome_fast.compat import (
    FluxNegToMePipeline,
    StableDiffusionXLNegToMePipeline,
)

# The guidance keeps alpha and threshold in fp32; these are the same numbers there.
ARGS = {"merging_alpha": 0.875, "merging_threshold": 0.25, "merging_t_end": 0}


Recorded = dict[str, list[Tensor]]


def flux() -> FluxNegToMePipeline:
    pipe = FluxNegToMePipeline(**flux_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl() -> StableDiffusionXLNegToMePipeline:
    components = {**sdxl_pipeline().components, "add_watermarker": False}
    pipe = StableDiffusionXLNegToMePipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def recorded(model: nn.Module) -> Iterator[Recorded]:
    """Collects the output of every attention module, step by step."""
    outputs: Recorded = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            outputs.setdefault(name, []).append(first.clone())

        return hook

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if name.endswith((".attn", ".attn1", ".attn2"))
    ]
    yield outputs
    for hook in hooks:
        hook.remove()


class Emulation:
    """Hooks that call the authors' definition where and when their processors call their function.

    FLUX.1: on the image tokens of the attention, in double blocks before the projection, in single
    blocks after `num_lang_tokens`. SDXL: after the projection, on each half of the batch, if the
    block's name begins with one of `blocks` and its height and width are at least `min_attn_dim`.
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 0.875,
        threshold: float = 0.25,
        window: tuple[float, float] = (1000, 0),
        blocks: tuple[str, ...] = ("up_blocks",),
        joint: int = -1,
        single: int = -1,
        min_attn_dim: int = 32,
        mask: Tensor | None = None,
    ) -> None:
        self.settings = (alpha, threshold)
        self.window, self.mask, self.min_attn_dim = window, mask, min_attn_dim
        self.time, self.shape = 0.0, (0, 0)
        self.hooks = [model.register_forward_pre_hook(self.read_time, with_kwargs=True)]
        if hasattr(model, "transformer_blocks"):
            doubles, singles = model.transformer_blocks, model.single_transformer_blocks
            for block in doubles[: None if joint < 0 else joint]:
                hook = block.attn.to_out[0].register_forward_pre_hook(self.before_projection)
                self.hooks.append(hook)
            for block in singles[: None if single < 0 else single]:
                self.hooks.append(block.attn.register_forward_hook(self.after_single))
            return
        for name, module in model.named_modules():
            if type(module).__name__ == "Transformer2DModel":
                self.hooks.append(module.register_forward_pre_hook(self.read_shape))
            if name.startswith(blocks) and name.endswith((".attn1", ".attn2")):
                self.hooks.append(module.register_forward_hook(self.after_attention))

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def read_time(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.time = float(kwargs["timestep"][0] * 1000 if "timestep" in kwargs else args[1])

    def read_shape(self, module: nn.Module, args: Any) -> None:
        self.shape = tuple(args[0].shape[-2:])

    def push(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        if not self.window[1] <= self.time <= self.window[0]:
            return tokens
        pairs = None
        if self.mask is not None:
            mask = self.mask
            if grid is not None:
                mask = F.interpolate(mask[None, None], grid, mode="nearest-exact")[0, 0]
            pairs = (mask.flatten() != 0).expand(len(tokens) * tokens.shape[1], -1)
        return authors_definition(tokens, *self.settings, pairs).to(tokens.dtype)

    def before_projection(self, module: nn.Module, args: Any) -> Any:
        return (self.push(args[0]),)

    def after_single(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :TEXT], self.push(output[:, TEXT:])], dim=1)

    def after_attention(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if min(self.shape) < self.min_attn_dim:
            return None
        half = len(output) // 2
        parts = [self.push(part, self.shape) for part in (output[:half], output[half:])]
        return torch.cat(parts)


def agree(ours: Recorded, theirs: Recorded) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        for a, b in zip(ours[name], theirs[name], strict=True):
            assert a.dtype == torch.float64
            torch.testing.assert_close(
                a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def small_vae(channels: int) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=channels,
        scaling_factor=0.4,
        shift_factor=0.1,
        force_upcast=True,
    ).eval()
