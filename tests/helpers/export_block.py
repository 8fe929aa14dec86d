"""A guided attention block in plain torch, for the tests of exports; `alpha` is an input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import negtome_fast as nf


class Block(nn.Module):
    """`x + negtome(attention(x))`, (B, N, D); alpha 0 outside of the window of guidance."""

    def __init__(self, channels: int = 32, heads: int = 2, **options: object) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.options = options

    def forward(self, x: Tensor, alpha: Tensor) -> Tensor:
        items, length, _ = x.shape
        split = self.qkv(x).view(items, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value)
        attended = self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + nf.negtome(attended, alpha=alpha, threshold=0.2, **self.options)  # type: ignore[arg-type]


def block(**options: object) -> Block:
    torch.manual_seed(0)
    return Block(**options).eval()  # type: ignore[arg-type]


def tokens(items: int, length: int, seed: int = 1) -> Tensor:
    """Tokens that resemble each other across items, so that guidance moves some and not all."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randn(length, 32, generator=generator)
    return pattern + torch.randn(items, length, 32, generator=generator)
