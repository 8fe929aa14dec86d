"""Filters that compare images with a bank of references, and any function as a filter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .bank import ReferenceBank
from .encoders import ImageEncoder, default_encoder
from .images import BATCH, check_side, resized
from .selection import select_nearest
from .verdicts import Verdict, checked_images

Hash = Literal["phash", "dhash", "average_hash", "whash"]
HASHES = get_args(Hash)


def _triggers(score: float, threshold: float, above: bool) -> bool:
    """Return True if the score is on the wrong side of the threshold; NaN always is."""
    return not (score < threshold if above else score > threshold)


class _Nearest:
    """Base of filters that compare an image with the nearest one of a bank."""

    def __init__(self, bank: ReferenceBank, threshold: float, name: str) -> None:
        self.bank = bank
        self.threshold = threshold
        self.name = name

    def _verdicts(self, score: Tensor, index: Tensor, above: bool) -> list[Verdict]:
        rows = zip(score.flatten().tolist(), index.flatten().tolist(), strict=True)
        return [
            Verdict(
                self.name,
                value,
                self.threshold,
                _triggers(value, self.threshold, above),
                self.bank.names[row],
                row,
            )
            for value, row in rows
        ]


class PixelDistance(_Nearest):
    """Root mean square difference of the pixels in [0, 1]; triggers at or below the threshold.

    Args:
        bank: the references.
        threshold: 0 (equal) to 1.
        size: side in pixels that images and references are resized to.
        name: name in the verdicts.
    """

    def __init__(
        self, bank: ReferenceBank, threshold: float, *, size: int = 64, name: str = "pixels"
    ) -> None:
        super().__init__(bank, _checked(threshold, 0, 1), name)
        check_side("size", size)
        self.size = size
        self._points = bank.thumbnails(size)

    def judge(self, images: Tensor) -> list[Verdict]:
        images = resized(checked_images(images), self.size)
        score, index = select_nearest(images, self._points.to(images.device))
        return self._verdicts(score / images[0].numel() ** 0.5, index, above=False)


class LatentDistance(_Nearest):
    """Root mean square difference of latents; triggers at or below the threshold.

    Args:
        bank: the references.
        threshold: in units of the latents, whose variance is about 1.
        encode: `(B, 3, H, W)` in [0, 1] -> latents `(B, ...)`, such as a VAE's scaled mean.
        size: side in pixels that images are resized to before they are encoded; None resizes the
            references to the size of the generated images.
        name: name in the verdicts.
    """

    def __init__(
        self,
        bank: ReferenceBank,
        threshold: float,
        encode: Callable[[Tensor], Tensor],
        *,
        size: int | None = None,
        name: str = "latents",
    ) -> None:
        super().__init__(bank, _checked(threshold, 0, float("inf")), name)
        if size is not None:
            check_side("size", size)
        self._encode = encode
        self._size = size
        self._points: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def judge(self, images: Tensor) -> list[Verdict]:
        images = checked_images(images)
        size = (self._size,) * 2 if self._size else tuple(images.shape[-2:])
        if size not in self._points:
            known = [
                self._encode(resized(part.to(images.device).float() / 255, size)).float()
                for part in self.bank.images.split(BATCH)
            ]
            self._points[size] = torch.cat(known)
        latents = self._encode(resized(images, size)).float()
        score, index = select_nearest(latents, self._points[size])
        return self._verdicts(score / latents[0].numel() ** 0.5, index, above=False)


class EncoderSimilarity(_Nearest):
    """Cosine of image features; triggers at or above the threshold.

    Args:
        bank: the references; its features are used if this encoder made them.
        threshold: cosine similarity, -1 to 1.
        encoder: None is EfficientNet-lite0 (`default_encoder`).
        name: name in the verdicts.
    """

    def __init__(
        self,
        bank: ReferenceBank,
        threshold: float,
        encoder: ImageEncoder | None = None,
        *,
        name: str = "features",
    ) -> None:
        encoder = encoder or default_encoder()
        super().__init__(bank.with_features(encoder), _checked(threshold, -1, 1), name)
        self.encoder = encoder

    def judge(self, images: Tensor) -> list[Verdict]:
        features = self.encoder(checked_images(images))
        assert self.bank.features is not None
        points = self.bank.features.to(features.device)
        score, index = select_nearest(features, points, metric="cosine")
        return self._verdicts(score, index, above=True)


class PerceptualHash(_Nearest):
    """Hamming distance of perceptual hashes; triggers at or below the threshold.

    Args:
        bank: the references.
        threshold: number of differing bits, 0 to `hash_size ** 2`.
        kind: a function of the library imagehash.
        hash_size: side of the square of bits.
        name: name in the verdicts.

    Raises:
        ImportError: imagehash is not installed; names the extra.
    """

    def __init__(
        self,
        bank: ReferenceBank,
        threshold: int,
        *,
        kind: Hash = "phash",
        hash_size: int = 8,
        name: str = "hash",
    ) -> None:
        check_side("hash_size", hash_size)
        super().__init__(bank, _checked(threshold, 0, hash_size**2), name)
        try:
            import imagehash
        except ImportError as error:
            raise ImportError(
                "perceptual hashes need the extra 'nudge': pip install 'negtome-fast[nudge]'"
            ) from error
        if kind not in HASHES:
            raise ValueError(f"`kind` must be one of {', '.join(HASHES)}, got {kind!r}")
        function = getattr(imagehash, kind)
        self._hash = lambda image: function(image, hash_size=hash_size)
        known = [self._bits(part.float() / 255) for part in bank.images.split(BATCH)]
        self._points = torch.cat(known)

    def _bits(self, images: Tensor) -> Tensor:
        from PIL import Image

        arrays = (images.permute(0, 2, 3, 1) * 255).round().to("cpu", torch.uint8).numpy()
        rows = [torch.from_numpy(self._hash(Image.fromarray(a)).hash.flatten()) for a in arrays]
        return torch.stack(rows).float()

    def judge(self, images: Tensor) -> list[Verdict]:
        # Bits are 0 and 1: the squared distance counts those that differ.
        score, index = select_nearest(self._bits(checked_images(images)), self._points)
        return self._verdicts(score.square().round(), index, above=False)


@dataclass(frozen=True)
class CallableFilter:
    """A filter that calls any function of images.

    Attributes:
        function: `(B, 3, H, W)` in [0, 1] -> a score for each image, as a tensor or a sequence.
        threshold: score at which the filter triggers.
        name: name in the verdicts.
        above: True triggers at or above the threshold, False at or below it.
    """

    function: Callable[[Tensor], Tensor | Sequence[float]]
    threshold: float
    name: str = "callable"
    above: bool = True

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function must be callable, got {type(self.function).__name__}")
        _checked(self.threshold, -float("inf"), float("inf"))

    def judge(self, images: Tensor) -> list[Verdict]:
        with torch.no_grad():
            scores = torch.as_tensor(self.function(checked_images(images))).flatten().tolist()
        if len(scores) != len(images):
            raise ValueError(
                f"the filter {self.name!r} must return a score for each of {len(images)} images, "
                f"it returned {len(scores)}"
            )
        return [
            Verdict(
                self.name,
                float(score),
                self.threshold,
                _triggers(score, self.threshold, self.above),
            )
            for score in scores
        ]


def _checked(threshold: float, low: float, high: float) -> float:
    if isinstance(threshold, (bool, str)) or not hasattr(threshold, "__float__"):
        raise TypeError(f"threshold must be a number, got {threshold!r:.40}")
    if not low <= threshold <= high or not math.isfinite(threshold):
        bounds = f"must lie between {low} and {high}" if high < math.inf else "must be finite"
        if low == 0 and high == math.inf:
            bounds += " and not negative"
        raise ValueError(f"threshold {bounds}, got {threshold!r}")
    return float(threshold)
