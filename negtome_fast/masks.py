"""Masks of references: from pixels of any size to the tokens of a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Grid


def masks_on_grid(masks: Sequence[Tensor | None], frames: int, grid: Grid, block: str) -> Tensor:
    """Stretches masks to the tokens of a block.

    Args:
        masks: one for each reference, bool (H, W) or (F, H, W) of any size; None allows all tokens.
        frames: frames of the reference's tokens; 1 for an image.
        grid: (height, width) of the tokens of a frame.
        block: the block's name, for the error.

    Returns:
        bool (R, frames * height * width) on the CPU: the tokens that may be matched.

    Raises:
        ValueError: a mask leaves no token.
    """
    stretched = [mask_on_grid(mask, (frames, *grid)) for mask in masks]
    for number, mask in enumerate(stretched):
        if not mask.any():
            raise ValueError(
                f"the mask of reference {number} leaves no token of {block}, which has {grid[0]} x "
                f"{grid[1]}: white covers less than half of each. Use a larger region, or leave "
                "small grids out with min_grid"
            )
    return torch.stack(stretched)


def mask_on_grid(mask: Tensor | None, size: tuple[int, int, int]) -> Tensor:
    """Returns bool (frames * height * width,): True where at least half of a token is True."""
    if mask is None:
        return torch.ones(size, dtype=torch.bool, device="cpu").flatten()
    pixels = mask.detach().cpu().float().reshape(1, -1, *mask.shape[-2:])
    return (F.adaptive_avg_pool3d(pixels, size) >= 0.5).flatten()
