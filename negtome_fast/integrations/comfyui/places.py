"""Image tokens in the attention outputs of ComfyUI's models.

A UNet has patches for attention outputs. A diffusion transformer has patches only for a block's
output, after its residual and MLP. So during a guided forward there are hooks on the output
projections of its attention modules instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from negtome_fast.config import Grid

from .refusals import ORDER

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
class Attention:
    """An attention module of a model, by the module of its output projection."""

    block: str
    module: nn.Module
    place: Place


def attentions_of(model: nn.Module) -> list[Attention]:
    """Returns the attention modules of a model of a class in `PLACES`."""
    found = []
    for name, module in model.named_modules():
        for place in PLACES[type(model).__name__]:
            block = name.removesuffix(f".{place.projection}")
            if block != name and fnmatchcase(block, place.blocks):
                found.append(Attention(block, module, place))
    return found


@dataclass
class ForwardTokens:
    """Numbers of tokens in one forward.

    Attributes:
        items: items of the latents' batch.
        image: tokens of the generated image.
        stream: tokens of the image stream, once a block has shown them: image and conditions.
        ran: attention modules that ran so far.
        paused: another node's references are in the model, which are not looked at.
    """

    items: int
    image: int = 0
    stream: int = 0
    ran: set[Any] = field(default_factory=set)
    paused: bool = False


def image_grid(model: nn.Module, latents: torch.Tensor) -> tuple[int, int, int]:
    """Returns (frames, height, width) in tokens of latents (B, C, H, W) or (B, C, F, H, W)."""
    patch = getattr(model, "patch_size", 1)
    sides = (1, patch, patch) if isinstance(patch, int) else (1, *patch)[-3:]
    sizes = (1, *latents.shape[2:])[-3:]
    frames, height, width = (-(-size // side) for size, side in zip(sizes, sides, strict=True))
    return frames, height, width


def unet_grid(tokens: torch.Tensor, block: str, items: int, options: dict[str, Any]) -> Grid:
    """Returns the (height, width) of the tokens (B, N, D) of a UNet's attention.

    Args:
        items: items of the latents' batch.
        options: what ComfyUI tells an attention patch. Before `activations_shape` was in it, the
            grid was one of the latents', halved some times.

    Raises:
        ValueError: the tokens are not those of the images.
    """
    count = tokens.shape[1]
    shape = options.get("activations_shape")
    height, width = (shape or options["original_shape"])[-2:]
    while shape is None and height * width > max(count, 1):
        height, width = -(-height // 2), -(-width // 2)
    if tokens.shape[0] != items or count != height * width:
        raise ValueError(
            f"{block} has a batch of {tokens.shape[0]} with {count} tokens each, where the latents "
            f"make {items} with {height} x {width}. Another node changes the tokens inside of the "
            f"attention and restores them after NegToMe (HyperTile, ToMe). {ORDER}"
        )
    return height, width


@contextmanager
def hooked(
    model: nn.Module,
    latents: torch.Tensor,
    apply: Apply,
    attentions: Sequence[Attention] | None = None,
) -> Iterator[ForwardTokens]:
    """Calls `apply` on the image tokens of every attention output of the forwards inside.

    Args:
        model: ComfyUI's diffusion model, of a class in `PLACES`; the hooks are removed at the end.
        latents: latents of the size that the forwards inside are given.
        apply: guides image tokens.
        attentions: `attentions_of(model)`, if they are known.
    """
    frames, height, width = image_grid(model, latents)
    tokens = frames * height * width
    forward = ForwardTokens(latents.shape[0], tokens, tokens)
    with ExitStack() as hooks:
        for one in attentions_of(model) if attentions is None else attentions:
            register = _on_output if one.place.at == "output" else _on_input
            hooks.callback(register(one, forward, apply).remove)
        yield forward


@contextmanager
def watched(attentions: Sequence[Attention]) -> Iterator[ForwardTokens]:
    """Notes whether the attention modules run in the forwards inside: all, if the last one does."""
    forward = ForwardTokens(0)

    def note(*_: Any) -> None:
        if not forward.paused:
            forward.ran.update(one.block for one in attentions)

    hook = attentions[-1].module.register_forward_pre_hook(note)
    try:
        yield forward
    finally:
        hook.remove()


def _on_output(
    attention: Attention, forward: ForwardTokens, apply: Apply
) -> torch.utils.hooks.RemovableHandle:
    alone = _is_alone(attention.module._forward_hooks)

    def guide(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor | None:
        if alone:
            _guide(output, attention, forward, apply)
            return None
        kept = output.clone()  # a hook of another node may keep the output
        _guide(kept, attention, forward, apply)
        return kept

    return attention.module.register_forward_hook(guide)


def _on_input(
    attention: Attention, forward: ForwardTokens, apply: Apply
) -> torch.utils.hooks.RemovableHandle:
    channels: int = attention.module.out_features  # type: ignore[assignment]
    alone = _is_alone(attention.module._forward_pre_hooks)

    def guide(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if alone:
            _guide(inputs[0][..., :channels], attention, forward, apply)
            return None
        kept = inputs[0].clone()
        _guide(kept[..., :channels], attention, forward, apply)
        return (kept, *inputs[1:])

    return attention.module.register_forward_pre_hook(guide)


def _is_alone(hooks: Mapping[int, Any]) -> bool:
    """Returns True if no other node has a hook there, which could keep the tensor."""
    return all(getattr(hook, "__module__", None) == __name__ for hook in hooks.values())


def _guide(
    tokens: torch.Tensor, attention: Attention, forward: ForwardTokens, apply: Apply
) -> None:
    """Guides the image among the tokens (B, S, D) in place; nobody else may hold them."""
    if forward.paused:
        return
    place, block, count = attention.place, attention.block, tokens.shape[1]
    forward.ran.add(block)
    if place.order == "image":
        forward.stream = count
    may_hold_others = place.order != "image" or place.conditions
    if tokens.shape[0] != forward.items:
        raise ValueError(
            f"{block} has a batch of {tokens.shape[0]} where the latents have {forward.items}; "
            "NegToMe would take the added items for images. Remove the node that adds items "
            "inside of the model, such as a sampler with negative attention guidance (NAG)"
        )
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
