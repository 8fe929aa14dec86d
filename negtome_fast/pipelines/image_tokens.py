"""`ImageTokens`: the image among the tokens of one forward, and the checks that it is the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import Grid


@dataclass(frozen=True)
class ImageTokens:
    """The image among the tokens of one forward.

    Attributes:
        num_tokens: number of tokens in the model's image stream. An attention output with this many
            tokens is all image.
        generated: number of these, from `offset` on, that are generated. The others are conditions:
            an edit pipeline puts them after, an image-to-video pipeline before.
        grid: (height, width) with frames * height * width = generated, where known.
        frames: number of generated frames in a video's latents; 1 for an image. Attention outputs
            (items * frames, height * width, D), one frame each, are guided as whole videos.
        starts: first image token of each item in an attention output that also holds text, for
            models that put captions of several lengths before the image. None: `Layout.joint`
            says where the image is.
        offset: index of the first generated token in the image stream.
    """

    num_tokens: int
    generated: int
    grid: Grid | None = None
    frames: int = 1
    starts: tuple[int, ...] | None = None
    offset: int = 0


def not_known(model: nn.Module, reason: str) -> ValueError:
    """Returns the error of a forward whose generated tokens cannot be told."""
    return ValueError(
        f"{type(model).__name__}: {reason}, so it is not known which tokens are the image; "
        "describe the model with negtome_fast.pipelines.register_layout"
    )


def grid_of_places(places: Tensor) -> Grid | None:
    """Returns (height, width) of tokens that are a whole grid, row by row; None if they are not.

    Args:
        places: (tokens, 2), row and column of each, from any number on and at any distance.
    """
    rows, row = places[:, 0].unique(return_inverse=True)
    columns, column = places[:, 1].unique(return_inverse=True)
    height, width = len(rows), len(columns)
    if height * width != len(places):
        return None
    expected = torch.arange(height * width, device=places.device)
    return (height, width) if torch.equal(row * width + column, expected) else None


def check_own_latents(
    model: nn.Module, tokens: ImageTokens | None, latents: Tensor, own: Tensor | None
) -> None:
    """Refuses a forward in which more is taken for generated than its pipeline generates.

    An edit pipeline gives its model images beside those that it generates, and its own latents are
    the generated ones alone.

    Args:
        tokens: the image tokens of the forward, where known.
        latents: the model's argument, items first.
        own: latents of the pipeline's call, where known.

    Raises:
        ValueError: the pipeline generates fewer tokens.
    """
    if tokens is None or own is None or latents.ndim != own.ndim:
        return
    more = False
    channels = getattr(getattr(model, "config", None), "in_channels", None)
    if latents.ndim == 3:
        more = own.shape[2] == latents.shape[2] and own.shape[1] < tokens.generated
    elif tokens.generated == tokens.num_tokens and channels is not None:
        # Conditions may also lie in further channels, which are no tokens.
        sizes = zip(own.shape[1:], latents.shape[1:], strict=True)
        more = any(size < given != channels for size, given in sizes)
    if more:
        raise not_known(
            model,
            f"{tokens.generated} of its tokens were taken for the image, and its pipeline has "
            f"latents of the shape {tuple(own.shape)}",
        )
