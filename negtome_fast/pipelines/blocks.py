"""Attention modules of a denoiser: which can be guided, and which a configuration chooses."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from ..config import NegToMeConfig
from .layouts import Layout

_PROJECTIONS = ("to_out", "out_layer", "img_attn_proj")
"""Names of the output projection of the image: diffusers', Kandinsky's, JoyImage's."""


def is_attention(module: nn.Module, layout: Layout) -> bool:
    """Returns True if the layout counts this module as an attention module."""
    return any(base.__name__ in layout.attention for base in type(module).__mro__)


def attention_modules(model: nn.Module, layout: Layout) -> dict[nn.Module, str]:
    """Returns the attention modules whose image tokens can be guided, with their names."""
    return {
        module: name
        for name, module in model.named_modules()
        if is_attention(module, layout)
        and any(fnmatchcase(name, pattern) for pattern in layout.blocks)
        and not any(fnmatchcase(name, pattern) for pattern in layout.exclude)
    }


def guided_blocks(model: nn.Module, layout: Layout, config: NegToMeConfig) -> dict[nn.Module, str]:
    """Returns the attention modules that a configuration guides, with their names.

    Raises:
        ValueError: there are none.
    """
    attention = attention_modules(model, layout)
    if not attention:
        raise ValueError(
            f"no attention module that can be guided was found in {type(model).__name__}; describe "
            "the model with negtome_fast.pipelines.register_layout"
        )
    guided = {module: name for module, name in attention.items() if config.includes_block(name)}
    if not guided:
        raise ValueError(
            f"blocks={config.blocks} with exclude_blocks={config.exclude_blocks} leave nothing to "
            f"guide; the blocks of {type(model).__name__} are {', '.join(attention.values())}"
        )
    return guided


def output_projection(block: nn.Module) -> nn.Module | None:
    """Returns the output projection of an attention module; None if it has none."""
    if getattr(block, "pre_only", False):
        return None
    projection = next((part for name in _PROJECTIONS if (part := getattr(block, name, None))), None)
    if isinstance(projection, (nn.ModuleList, nn.Sequential)):
        return projection[0]
    return projection if isinstance(projection, nn.Module) else None
