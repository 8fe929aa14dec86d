"""Image tokens in the attention outputs of ComfyUI's models.

A UNet has patches for attention outputs. A diffusion transformer has patches only for a block's
output, after its residual and MLP. So during a guided forward there are hooks on the output
projections of its attention modules instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

Apply = Callable[[torch.Tensor, str], torch.Tensor]
"""(image tokens (B, N, D) that may be written into, name of the block) -> the guided tokens."""

UNET = "UNetModel"
"""Class of the UNets of Stable Diffusion 1.x, 2.x, XL and of models like them."""


@dataclass(frozen=True)
class Place:
    """Attention modules of one kind, and the image among their tokens.

    Attributes:
        blocks: pattern (fnmatch) of the modules' names in ComfyUI's diffusion model.
        projection: name of the output projection inside of each.
        order: `"image"`: all tokens are image; `"text_first"` or `"image_first"`: some are text.
        at: guide the `"output"` of the projection; or its `"input"`, if attention and MLP share
            one projection, whose first channels are the attention.
        conditions: tokens of other images may follow the generated image's.
    """

    blocks: str
    projection: str
    order: Literal["image", "text_first", "image_first"] = "image"
    at: Literal["output", "input"] = "output"
    conditions: bool = False


_FLUX = (
    Place("double_blocks.*.img_attn", "proj", conditions=True),
    Place("single_blocks.*", "linear2", order="text_first", at="input"),
)
PLACES: dict[str, tuple[Place, ...]] = {
    "Flux": _FLUX,
    "Chroma": _FLUX,
    "OpenAISignatureMMDITWrapper": (
        Place("joint_blocks.*.x_block.attn", "proj"),
        Place("joint_blocks.*.x_block.attn2", "proj"),
    ),
    "MMDiT": (
        Place("double_layers.*.attn", "w2o"),
        Place("single_layers.*.attn", "w1o", order="text_first"),
    ),
    "PixArtMS": (Place("blocks.*.attn", "proj"), Place("blocks.*.cross_attn", "proj")),
    "QwenImageTransformer2DModel": (
        Place("transformer_blocks.*.attn", "to_out.0", conditions=True),
    ),
    "WanModel": (Place("blocks.*.self_attn", "o"), Place("blocks.*.cross_attn", "o")),
    "HunyuanVideo": (
        Place("double_blocks.*.img_attn", "proj"),
        Place("single_blocks.*", "linear2", order="image_first", at="input"),
    ),
}
"""Class of ComfyUI's diffusion model -> its places: FLUX.1, Chroma, SD3, AuraFlow, PixArt,
Qwen-Image, Wan, HunyuanVideo. Add an entry to guide another class."""


def check_model(model: Any) -> None:
    """Refuses a `comfy.model_base.BaseModel` whose image tokens are not known.

    Raises:
        ValueError: it is of an unknown class, or a UNet with temporal layers.
    """
    name = type(model.diffusion_model).__name__
    if name == UNET:
        config = getattr(getattr(model, "model_config", None), "unet_config", {})
        if config.get("use_temporal_attention"):
            raise ValueError(
                "this UNet has temporal layers, in whose batch the frames are items; NegToMe "
                "guides UNets that make images"
            )
    elif name not in PLACES:
        raise ValueError(
            f"NegToMe does not know where the image tokens of {name} are; it knows "
            f"{', '.join((UNET, *PLACES))}. If a node compiles the model, remove that node; for "
            "another class add an entry to PLACES in places.py of this node pack"
        )


@dataclass
class _Forward:
    """Numbers of tokens in one forward.

    Attributes:
        image: tokens of the generated image.
        stream: tokens of the image stream, once a block has shown them: image and conditions.
    """

    image: int
    stream: int


def image_grid(model: nn.Module, latents: torch.Tensor) -> tuple[int, int, int]:
    """Returns (frames, height, width) in tokens of latents (B, C, H, W) or (B, C, F, H, W)."""
    patch = getattr(model, "patch_size", 1)
    sides = (1, patch, patch) if isinstance(patch, int) else (1, *patch)[-3:]
    sizes = (1, *latents.shape[2:])[-3:]
    frames, height, width = (-(-size // side) for size, side in zip(sizes, sides, strict=True))
    return frames, height, width


@contextmanager
def hooked(model: nn.Module, latents: torch.Tensor, apply: Apply) -> Iterator[None]:
    """Calls `apply` on the image tokens of every attention output of the forwards inside.

    Args:
        model: ComfyUI's diffusion model, of a class in `PLACES`; the hooks are removed at the end.
        latents: latents of the size that the forwards inside are given.
        apply: guides image tokens.
    """
    frames, height, width = image_grid(model, latents)
    tokens = frames * height * width
    forward = _Forward(tokens, tokens)
    places = PLACES[type(model).__name__]
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            for place in places:
                suffix = f".{place.projection}"
                if name.endswith(suffix) and fnmatchcase(name.removesuffix(suffix), place.blocks):
                    register = _on_output if place.at == "output" else _on_input
                    hook = register(module, name.removesuffix(suffix), place, forward, apply)
                    hooks.callback(hook.remove)
        yield


def _on_output(
    module: nn.Module, block: str, place: Place, forward: _Forward, apply: Apply
) -> torch.utils.hooks.RemovableHandle:
    def guide(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        _guide(output, block, place, forward, apply)

    return module.register_forward_hook(guide)


def _on_input(
    module: nn.Module, block: str, place: Place, forward: _Forward, apply: Apply
) -> torch.utils.hooks.RemovableHandle:
    channels: int = module.out_features  # type: ignore[assignment]

    def guide(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        _guide(inputs[0][..., :channels], block, place, forward, apply)

    return module.register_forward_pre_hook(guide)


def _guide(tokens: torch.Tensor, block: str, place: Place, forward: _Forward, apply: Apply) -> None:
    """Guides the image among the tokens (B, S, D) in place; nobody else may hold them."""
    count = tokens.shape[1]
    if place.order == "image":
        forward.stream = count
    may_hold_others = place.order != "image" or place.conditions
    if count < forward.image or (count > forward.image and not may_hold_others):
        raise ValueError(
            f"{block} has {count} tokens where the latents make {forward.image}; NegToMe cannot "
            "tell which of them are the image. Remove the node that adds or removes tokens"
        )
    first = count - forward.stream if place.order == "text_first" else 0
    image = tokens[:, first : first + forward.image]
    guided = apply(image, block)
    if guided is not image:
        image.copy_(guided)
