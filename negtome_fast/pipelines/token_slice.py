"""The image tokens of an attention output: cut out, guided, put back.

FLUX.1 attends over text and image as one sequence, in its single blocks and before the projection
of the double ones:

    tokens (B, T + N, D)  ->  tokens[:, T + offset : T + offset + generated]  ->  guided  ->  tokens

`Layout.joint` says whether text or image comes first, `ImageTokens` how many tokens are the image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .layouts import ImageTokens, Layout

Guide: TypeAlias = Callable[[Tensor, bool], Tensor]
"""(image tokens (B, N, D), may be written into) -> guided tokens, or the argument itself."""


def guide_image_part(
    tokens: Tensor,
    guide: Guide,
    starts: tuple[int, ...],
    count: int,
    inplace: bool,
    copy_all: bool,
) -> Tensor:
    """Guides the image tokens of an attention output.

    Args:
        tokens: (B, S, D), image and perhaps text.
        guide: guides the image tokens (B, count, D).
        starts, count: as `find_image` returns them.
        inplace: `tokens` may be written into.
        copy_all: copy all tokens and write into the copy, rather than join a new image with the
            text.

    Returns:
        Tokens (B, S, D); `tokens` itself if nothing was guided or they were written into.
    """
    if min(starts) != max(starts):
        return _guide_scattered(tokens, guide, starts, count)
    start, stop = starts[0], starts[0] + count
    if (start, stop) == (0, tokens.shape[1]):
        return guide(tokens, inplace)
    if copy_all and not inplace:
        tokens, inplace = tokens.clone(), True
    image = tokens[:, start:stop]
    guided = guide(image, inplace)
    if guided is image:
        return tokens
    return torch.cat([tokens[:, :start], guided, tokens[:, stop:]], dim=1)


def _guide_scattered(tokens: Tensor, guide: Guide, starts: tuple[int, ...], count: int) -> Tensor:
    """Guides images that begin at different tokens, after captions of several lengths."""
    places = torch.tensor(starts, device=tokens.device)[:, None, None]
    places = places + torch.arange(count, device=tokens.device)[:, None]
    places = places.expand(-1, -1, tokens.shape[2])
    image = tokens.gather(1, places)
    guided = guide(image, False)
    return tokens if guided is image else tokens.scatter(1, places, guided)


def find_image(
    tokens: Tensor, image: ImageTokens | None, layout: Layout, all_image: bool
) -> tuple[tuple[int, ...], int] | None:
    """Finds the image in an attention output (B, S, D).

    Args:
        image: the image tokens of this forward, where known.
        all_image: every token is image, however many there are.

    Returns:
        The first image token of each item (one number if it is the same for all) and the number of
        image tokens; None if they are not known.
    """
    length = tokens.shape[1] if tokens.ndim == 3 else -1
    if image is None:
        return ((0,), length) if all_image and length >= 0 else None
    if length == image.num_tokens:
        return (image.offset,), image.generated
    if length > image.num_tokens and not all_image:
        if image.starts is not None and len(image.starts) == tokens.shape[0]:
            return image.starts, image.generated
        if layout.joint:
            start = length - image.num_tokens if layout.joint == "text_first" else 0
            return (start + image.offset,), image.generated
    return None


def attended_channels(attention: nn.Module, tokens: Tensor) -> int:
    """Returns how many channels of the input of an output projection are attention.

    FLUX.2's single blocks project the feed-forward's channels together with them.

    Args:
        attention: the attention module.
        tokens: (B, S, C), the input of its projection.
    """
    if not hasattr(attention, "mlp_hidden_dim"):
        return tokens.shape[2]
    return min(int(getattr(attention, "inner_dim", tokens.shape[2])), tokens.shape[2])


def holds_single_frames(tokens: Tensor, image: ImageTokens | None, items: int) -> bool:
    """Returns True if the batch is the frames of the videos, in order: (B * F, H * W, D).

    Args:
        image: the image tokens of the forward, where known.
        items: number B of videos.
    """
    if image is None or image.frames == 1:
        return False
    one_frame = (items * image.frames, image.num_tokens // image.frames)
    return tokens.ndim == 3 and tokens.shape[:2] == one_frame
