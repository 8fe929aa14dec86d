"""Images of a bank: found in a folder, read as square tensors, and resized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..pipelines.pictures import IMAGE_SUFFIXES, opened

BATCH = 32
"""Images that are converted, resized or encoded at once."""


MOST_PIXELS = 4096
"""Largest side of a bank's images in pixels."""


def check_side(name: str, size: Any) -> None:
    """Refuse a side in pixels that is not 1 to `MOST_PIXELS`."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MOST_PIXELS:
        raise ValueError(f"`{name}` must be 1 to {MOST_PIXELS} pixels, got {size!r:.40}")


def resized(images: Tensor, size: int | tuple[int, ...]) -> Tensor:
    """Resize images `(B, C, H, W)` to `size` pixels (a side, or height and width), antialiased."""
    size = (size, size) if isinstance(size, int) else size
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def named_images(images: str | Path | Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yield names and sources of the images of a folder (searched recursively) or an iterable.

    Raises:
        FileNotFoundError: no such folder.
    """
    if isinstance(images, (str, Path)):
        folder = Path(images)
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}")
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                yield path.relative_to(folder).as_posix(), path
        return
    for number, image in enumerate(images):
        if isinstance(image, tuple) and len(image) == 2 and isinstance(image[0], str):
            yield image
        else:
            yield (str(image) if isinstance(image, (str, Path)) else str(number)), image


def square(source: Any, size: int) -> Tensor:
    """Return the central square of an image, `(3, size, size)` uint8."""
    from PIL import Image

    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise TypeError(f"an array must be (H, W, 3) uint8, got {source.dtype} {source.shape}")
        image = Image.fromarray(source)
    elif isinstance(source, (str, Path)):
        with opened(Path(source), "image") as found:
            image = found.convert("RGB")
    elif isinstance(source, Image.Image):
        image = source.convert("RGB")
    else:
        raise TypeError(f"not an image: {type(source).__name__}")
    side = min(image.size)
    if side < 1:
        raise ValueError(f"the image has no pixels: {image.size[0]} x {image.size[1]}")
    left, top = ((length - side) // 2 for length in image.size)
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
