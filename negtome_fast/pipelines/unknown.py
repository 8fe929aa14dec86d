"""Image tokens of a model that is not in the table, where its arguments leave no doubt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .image_tokens import ImageTokens, grid_of_places, not_known


def unknown_image_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> ImageTokens:
    """Reads the first tensor of an unknown model: (B, N, C), (B, C, H, W) or a video, in patches.

    Raises:
        ValueError: the arguments do not tell which tokens are the image, or that all are generated.
    """
    name, latents = next(
        ((k, v) for k, v in arguments.items() if isinstance(v, Tensor)), ("", None)
    )
    if latents is None:
        raise not_known(model, "its forward was given no tensor")
    shape = tuple(latents.shape)
    if latents.ndim not in (3, 4, 5) or not latents.is_floating_point():
        kind = str(latents.dtype).removeprefix("torch.")
        raise not_known(model, f"its latents are {kind} of the shape {shape}")
    tokens = _packed(latents) if latents.ndim == 3 else _patches(model, latents)
    for other, value in arguments.items():
        doubt = "" if other == name else _doubt(other, value, latents, tokens.num_tokens)
        if doubt:
            raise not_known(model, f"its argument {other} {doubt}")
    return tokens


def _packed(latents: Tensor) -> ImageTokens:
    return ImageTokens(latents.shape[1], latents.shape[1])


def _patches(model: nn.Module, latents: Tensor) -> ImageTokens:
    """Counts the patches of latents (B, C, H, W), (B, C, F, H, W) or (B, F, C, H, W)."""
    config = getattr(model, "config", None)
    size: Any = getattr(config, "patch_size", None) or 1
    patch = [getattr(config, "patch_size_t", None) or 1, size, size]
    if not isinstance(size, int):
        patch = [1, *size][-3:]
    frames = 1
    if latents.ndim == 5:
        channels = getattr(config, "in_channels", None)
        axes = [axis for axis in (1, 2) if latents.shape[axis] == channels]
        if len(axes) != 1:
            raise not_known(
                model, f"its latents {tuple(latents.shape)} do not tell frames from channels"
            )
        frames = latents.shape[3 - axes[0]] // patch[0]
    height, width = latents.shape[-2] // patch[1], latents.shape[-1] // patch[2]
    count = frames * height * width
    return ImageTokens(count, count, (height, width), frames)


def _doubt(name: str, value: Any, latents: Tensor, count: int) -> str:
    """Returns what an argument says against all of `count` tokens being generated; nothing if so.

    Args:
        latents: (B, count, C) if packed, or not packed.
    """
    packed = latents.ndim == 3
    if isinstance(value, (list, tuple)):
        return _doubt_of_sizes(value, latents.shape[0], count) if packed else ""
    if not isinstance(value, Tensor):
        return ""
    if value.is_floating_point() and any(word in name for word in ("time", "sigma")):
        return "has several values for an item" if _differs(value) else ""
    if packed and value.shape[-2:-1] == (count,) and 2 <= value.shape[-1] <= 4:
        return _doubt_of_places(value)
    if value.is_floating_point():
        if value.ndim == 3 and value.shape[1] == count:
            return f"has {count} tokens, too, as for text"
        is_mask = value.ndim == latents.ndim > 3 and value.shape[1] == 1
        if is_mask and value.shape[2:] == latents.shape[2:] and _differs(value):
            return "marks a part of the latents"
    elif value.ndim in (1, 2) and value.shape[-1] == count and _differs(value.reshape(-1, count)):
        return "tells kinds of tokens apart"
    return ""


def _differs(value: Tensor) -> bool:
    """Returns True if an item (the first axis) has several values."""
    if value.ndim < 2:
        return False
    items = value.flatten(1)
    return bool((items != items[:, :1]).any())


def _doubt_of_places(places: Tensor) -> str:
    """Reads places (count, 2 to 4) or (B, count, 2 to 4): row and column, and others before."""
    items = places[None] if places.ndim == 2 else places.flatten(0, -3)
    row = 0 if items.shape[2] == 2 else 1
    others = [axis for axis in range(items.shape[2]) if axis not in (row, row + 1)]
    one = not _differs(items[..., others].transpose(1, 2).flatten(0, 1)) if others else True
    if one and all(grid_of_places(item[:, row : row + 2]) for item in items.unique(dim=0)):
        return ""
    return "does not place the tokens of one image row by row"


def _doubt_of_sizes(sizes: Any, batch: int, count: int) -> str:
    """Reads sizes (..., height, width) of the images in a row: one for each item, or a list."""
    if not sizes or not all(isinstance(size, (list, tuple)) for size in sizes):
        return ""
    for item in sizes if len(sizes) == batch else [sizes]:
        images = list(_sizes_in(item))
        if images and (len(images) > 1 or math.prod(images[0]) != count):
            return f"tells of other images than one of {count} tokens"
    return ""


def _sizes_in(value: Any) -> Iterator[tuple[int, ...]]:
    """Yields the tuples of numbers in a list of lists."""
    if value and all(isinstance(length, int) for length in value):
        yield tuple(value)
        return
    for entry in value:
        if isinstance(entry, (list, tuple)):
            yield from _sizes_in(entry)
