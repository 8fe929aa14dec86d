"""The shapes of hidden states that are measured, and the random tokens that fill them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

SHARED = (0.3, 0.95)
"""Range of the reference's share in a token; with it about half of the tokens are pushed."""


@dataclass(frozen=True)
class Shape:
    """Hidden states (items, tokens, channels) in equal groups, whose item 0 is the reference.

    Attributes:
        independent: no token resembles another; see `random_tokens`.
        others: every item meets all other items of its group, instead of item 0 alone.
    """

    name: str
    items: int
    tokens: int
    channels: int
    groups: int = 1
    independent: bool = False
    others: bool = False

    @property
    def products(self) -> int:
        """Number of pairs of a source item and a reference item; `others` has both directions."""
        size = self.items // self.groups
        return self.groups * (size * (size - 1) if self.others else size - 1)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of matching, N * N * D for each product; references are not sources.

        With `others` one product could serve both directions of a pair; both are counted.
        """
        return self.products * self.tokens**2 * self.channels

    @property
    def least_elements(self) -> int:
        """Elements that any method must move: each token is read once, each result written once."""
        return 2 * self.elements

    @property
    def elements(self) -> int:
        return self.items * self.tokens * self.channels

    def __str__(self) -> str:
        size = f"{self.items}x{self.tokens}x{self.channels}"
        size = size if self.groups == 1 else f"{size}/{self.groups}"
        size = f"{size},independent" if self.independent else size
        return f"{size},others" if self.others else size


FLUX_1024 = Shape("FLUX 1024 px", 4, 4096, 3072)
FLUX_1024_OTHERS = Shape("FLUX 1024 px, others", 4, 4096, 3072, others=True)
FLUX_768 = Shape("FLUX 768 px", 4, 2304, 3072)
SDXL_64 = Shape("SDXL 1024 px, 64x64", 8, 4096, 640, groups=2)
SDXL_32 = Shape("SDXL 1024 px, 32x32", 8, 1024, 1280, groups=2)
SD3_1024 = Shape("SD3.5-large 1024 px", 8, 4096, 2432, groups=2)
SD3_512 = Shape("SD3-medium 512 px", 8, 1024, 1536, groups=2)
QWEN_1328 = Shape("Qwen-Image 1328 px", 4, 6889, 3072)
LTX_121 = Shape("LTX-Video 768x512, 121 frames", 4, 6144, 2048, groups=2)
WAN_480 = Shape("Wan 1.3B 480p, 81 frames", 2, 32760, 1536)
WAN_720 = Shape("Wan 14B 720p, 81 frames", 2, 75600, 5120)
SDXL_64_ONE_GROUP = Shape("SDXL 64x64, one group", 4, 4096, 640)
SDXL_32_ONE_GROUP = Shape("SDXL 32x32, one group", 4, 1024, 1280)
LONG = Shape("16384 tokens", 2, 16384, 640)
QUICK_SHAPES = (Shape("quick", 3, 512, 320), Shape("quick, groups", 4, 256, 640, groups=2))


def parse_shape(text: str) -> Shape:
    """Parse `"4x4096x640"`, or `"8x4096x640/2"` for two groups; then `,independent`, `,others`.

    Raises:
        ValueError: the text is not a shape, or a group would be unequal or hold a single item.
    """
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:/(\d+))?(,independent)?(,others)?", text)
    if not found:
        raise ValueError(
            f"shape {text!r} is not ITEMSxTOKENSxCHANNELS, .../GROUPS, ...,independent, ...,others"
        )
    items, tokens, channels, groups = (int(part or 1) for part in found.groups()[:4])
    if min(items, tokens, channels, groups) < 1 or items % groups or items == groups:
        raise ValueError(f"shape {text!r} needs 2 or more items in each of its equal groups")
    marks = {"independent": found[5] is not None, "others": found[6] is not None}
    return Shape(text, items, tokens, channels, groups, **marks)


def random_tokens(
    shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> Tensor:
    """Random hidden states in which every token resembles some token of its reference.

    Each token is `c * r + sqrt(1 - c^2) * noise` for a random reference token `r` and a random
    `c`, so that cosines spread around the threshold as they do in a network. Tokens of an
    `independent` shape are noise alone: in hundreds of channels none is similar and none is pushed.
    They are for methods whose time depends on how clear the match is.
    """
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.empty(shape.items, shape.tokens, shape.channels, dtype=dtype, device=device)
    size = shape.items // shape.groups
    for item in range(shape.items):
        x[item].normal_(generator=generator)
        if item % size == 0 or shape.independent:
            continue
        reference = x[item - item % size]
        shared = torch.rand(shape.tokens, 1, generator=generator, device=device)
        shared = (SHARED[0] + (SHARED[1] - SHARED[0]) * shared).to(dtype)
        chosen = torch.randint(shape.tokens, (shape.tokens,), generator=generator, device=device)
        x[item].mul_((1 - shared**2).sqrt()).addcmul_(shared, reference[chosen])
    return x
