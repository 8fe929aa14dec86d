"""Filters: what must not be returned, as scores against references with a threshold and a name.

A filter is asked for images (B, 3, H, W) in [0, 1] and answers with a score and the nearest
reference of each. `judge` asks filters in their order and stops, image by image, at the first that
triggers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .bank import BATCH, Encoder, ReferenceBank, default_encoder, resized
from .selection import select_nearest


@dataclass(frozen=True)
class Verdict:
    """What one filter says of one image.

    Attributes:
        filter: the filter's name.
        score: of the image, in the filter's unit.
        threshold: the filter's.
        triggered: the score lies on the wrong side of the threshold.
        nearest: name of the nearest reference, where the filter has references.
        index: its row in the filter's bank, -1 where it has none.
    """

    filter: str
    score: float
    threshold: float
    triggered: bool
    nearest: str | None = None
    index: int = -1


class Filter(Protocol):
    """What `judge` and `generate_with_nudging` need of a filter."""

    @property
    def name(self) -> str: ...

    def judge(self, images: Tensor) -> list[Verdict]:
        """A verdict for each of the images `(B, 3, H, W)` in [0, 1]."""
        ...


def _triggers(score: float, threshold: float, above: bool) -> bool:
    """Whether the score is on the wrong side; NaN is, because nothing vouches for the image."""
    return not (score < threshold if above else score > threshold)


class _Nearest:
    """A filter that compares with the nearest image of a bank."""

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
        size: both are resized to this many pixels a side.
    """

    def __init__(
        self, bank: ReferenceBank, threshold: float, *, size: int = 64, name: str = "pixels"
    ) -> None:
        super().__init__(bank, _checked(threshold, 0, 1), name)
        self.size = size
        self._points = bank.thumbnails(size)

    def judge(self, images: Tensor) -> list[Verdict]:
        images = resized(_images(images), self.size)
        score, index = select_nearest(images, self._points.to(images.device))
        return self._verdicts(score / images[0].numel() ** 0.5, index, above=False)


class LatentDistance(_Nearest):
    """Root mean square difference of latents; triggers at or below the threshold.

    Args:
        bank: the references.
        threshold: in units of the latents, whose variance is about 1.
        encode: `(B, 3, H, W)` in [0, 1] -> latents `(B, ...)`, such as a VAE's mean, scaled.
        size: pixels a side that images are resized to before they are encoded; None leaves the
            generated ones as they are and resizes the references to them.
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
        self._encode = encode
        self._size = size
        self._points: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def judge(self, images: Tensor) -> list[Verdict]:
        images = _images(images)
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
        bank: the references; its features are used where they are this encoder's.
        threshold: cosine similarity, -1 to 1.
        encoder: None is EfficientNet-lite0 (`default_encoder`).
    """

    def __init__(
        self,
        bank: ReferenceBank,
        threshold: float,
        encoder: Encoder | None = None,
        *,
        name: str = "features",
    ) -> None:
        encoder = encoder or default_encoder()
        super().__init__(bank.with_features(encoder), _checked(threshold, -1, 1), name)
        self.encoder = encoder

    def judge(self, images: Tensor) -> list[Verdict]:
        features = self.encoder(_images(images))
        assert self.bank.features is not None
        points = self.bank.features.to(features.device)
        score, index = select_nearest(features, points, metric="cosine")
        return self._verdicts(score, index, above=True)


class PerceptualHash(_Nearest):
    """Hamming distance of perceptual hashes; triggers at or below the threshold.

    Args:
        bank: the references.
        threshold: differing bits, of `hash_size ** 2`.
        kind: of the library imagehash: `"phash"`, `"dhash"`, `"average_hash"` or `"whash"`.

    Raises:
        ImportError: imagehash is not installed; names the extra.
    """

    def __init__(
        self,
        bank: ReferenceBank,
        threshold: int,
        *,
        kind: Literal["phash", "dhash", "average_hash", "whash"] = "phash",
        hash_size: int = 8,
        name: str = "hash",
    ) -> None:
        super().__init__(bank, _checked(threshold, 0, hash_size**2), name)
        try:
            import imagehash
        except ImportError as error:
            raise ImportError(
                "perceptual hashes need the extra 'nudge': pip install 'negtome-fast[nudge]'"
            ) from error
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
        score, index = select_nearest(self._bits(_images(images)), self._points)
        return self._verdicts(score.square().round(), index, above=False)


@dataclass(frozen=True)
class CallableFilter:
    """Any function of images as a filter.

    Attributes:
        function: `(B, 3, H, W)` in [0, 1] -> a score for each image, a tensor or a sequence.
        threshold: where it triggers.
        name: of the verdicts.
        above: triggers at or above the threshold, otherwise at or below it.
    """

    function: Callable[[Tensor], Tensor | Sequence[float]]
    threshold: float
    name: str = "callable"
    above: bool = True

    def judge(self, images: Tensor) -> list[Verdict]:
        with torch.no_grad():
            scores = torch.as_tensor(self.function(_images(images))).flatten().tolist()
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


def judge(filters: Sequence[Filter], images: Tensor) -> list[tuple[Verdict, ...]]:
    """The verdicts on every image, filter by filter in the order given.

    An image that has triggered a filter is not shown to the later ones: put the cheap ones first.

    Args:
        filters: at least one.
        images: `(B, 3, H, W)` in [0, 1].

    Returns:
        For each image its verdicts; the last has `triggered` where the image did not pass.
    """
    images = _images(images)
    verdicts: list[list[Verdict]] = [[] for _ in images]
    open_ = list(range(len(images)))
    for one in filters:
        if not open_:
            break
        for place, verdict in zip(open_, one.judge(images[open_]), strict=True):
            verdicts[place].append(verdict)
        open_ = [place for place in open_ if not verdicts[place][-1].triggered]
    return [tuple(rows) for rows in verdicts]


def _images(images: Tensor) -> Tensor:
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != 3:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be (B, 3, H, W) in [0, 1], got {shape}")
    return images.float()


def _checked(threshold: float, low: float, high: float) -> float:
    if isinstance(threshold, bool) or not low <= threshold <= high:
        raise ValueError(f"threshold must lie between {low} and {high}, got {threshold!r}")
    return float(threshold)
