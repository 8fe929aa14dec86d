"""Filters by name and threshold, and the banks that they compare with.

The embedded model has banks of its own: its protected characters, drawn by name, and ordinary
images, drawn from a description of the same character in other words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..models.avatars import CHARACTERS, prompt_for
from ..nudging.bank import ReferenceBank
from ..nudging.filters import (
    CallableFilter,
    EncoderSimilarity,
    LatentDistance,
    PerceptualHash,
    PixelDistance,
)
from ..nudging.latents import layout_of_pipeline
from ..nudging.verdicts import Filter

FILTERS = ("pixels", "latents", "features", "hash", "reader")
"""Names of filters; `reader` is for the embedded model only."""

_RANGES = {
    "pixels": (0, 1),
    "latents": (0, math.inf),
    "features": (-1, 1),
    "hash": (0, 64),
    "reader": (0, 1),
}
"""Smallest and largest threshold of each filter."""

DEFAULT_FILTERS = ("pixels:0.1",)
EMBEDDED_FILTERS = ("pixels:0.1", "reader:0.5")

PROTECTED_SEED, DESCRIBED_SEED = 1_000_000, 2_000_000
"""First seeds of the embedded model's images of protected characters and of ordinary ones."""

DESCRIBED = 16
"""Ordinary images of each protected character's description."""


def parse_filter(text: str) -> tuple[str, float]:
    """Read `NAME:THRESHOLD`.

    Raises:
        ValueError: an unknown name, no number, or one that is no threshold of this filter.
    """
    name, _, value = text.partition(":")
    if name not in FILTERS:
        raise ValueError(f"`filters` {text}: no filter {name!r}; there are {', '.join(FILTERS)}")
    try:
        threshold = float(value)
    except ValueError:
        raise ValueError(f"`filters` {text} is not NAME:THRESHOLD, such as pixels:0.1") from None
    low, high = _RANGES[name]
    if not low <= threshold <= high or math.isinf(threshold):
        bounds = f"lie between {low} and {high}" if high < math.inf else "be finite and not below 0"
        raise ValueError(f"`filters` {text}: the threshold must {bounds}, got {value}")
    if name == "hash" and threshold != int(threshold):
        raise ValueError(f"`filters` {text}: a hash's threshold is a number of bits, got {value}")
    return name, threshold


def build_filter(name: str, threshold: float, bank: ReferenceBank, pipe: Any) -> Filter:
    """Build the filter of this name, which compares with the bank.

    Raises:
        ValueError: `threshold` does not fit, or the pipeline cannot encode images for `latents`.
        ImportError: a package is missing; names the extra to install.
    """
    if name == "pixels":
        return PixelDistance(bank, threshold)
    if name == "features":
        return EncoderSimilarity(bank, threshold)
    if name == "hash":
        return PerceptualHash(bank, int(threshold))
    if name == "reader":
        return CallableFilter(_protected_share(), threshold, "reader")
    encode = layout_of_pipeline(pipe).encode
    if encode is None:
        raise ValueError(
            f"`filters` latents: it is not known how {type(pipe).__name__} encodes images"
        )

    def latents(images: Tensor) -> Tensor:
        return torch.cat([encode(pipe, image[None] * 2 - 1).cpu() for image in images])

    return LatentDistance(bank, threshold, latents)


def _protected_share() -> Callable[[Tensor], Tensor]:
    """Function of images that returns the reader's probability of a protected character."""
    from ..models.reader import load_reader

    reader = load_reader()[0]

    def share(images: Tensor) -> Tensor:
        return 1 - reader(images * 2 - 1)["character"].softmax(dim=-1)[:, 0]

    return share


def load_bank(path: Path, size: int = 512) -> ReferenceBank:
    """Load a saved bank, or build one from the images of a folder.

    Args:
        path: the folder.
        size: side in pixels of the images of a bank that is built.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: nothing in it can be read.
    """
    if (path / "bank.json").is_file():
        return ReferenceBank.load(path)
    return ReferenceBank.build(path, size=size)


def own_characters(pipe: Any) -> ReferenceBank:
    """Bank of the embedded model's protected characters, drawn from their names."""
    drawn = [models.generate(pipe, name, [PROTECTED_SEED])[0] for name in CHARACTERS]
    return bank_of(tuple(CHARACTERS), torch.stack(drawn))


def own_descriptions(pipe: Any, name: str, filters: Sequence[Filter]) -> ReferenceBank:
    """Bank of images that pass the filters, drawn from a description without the name."""
    description = prompt_for(**CHARACTERS[name][0].attributes())
    seeds = range(DESCRIBED_SEED, DESCRIBED_SEED + DESCRIBED)
    drawn = models.generate(pipe, description, list(seeds))
    names = tuple(f"{description} {seed - DESCRIBED_SEED}" for seed in seeds)
    return bank_of(names, drawn).passing(filters)


def bank_of(names: tuple[str, ...], images: Tensor) -> ReferenceBank:
    """Bank of images `(K, 3, S, S)` in [0, 1]."""
    return ReferenceBank(names, (images.clamp(0, 1) * 255).round().byte().cpu())
