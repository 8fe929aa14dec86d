"""`ReferenceBank`: undesired or desired images, their features, and their place on disk.

A folder of two files: `bank.safetensors` (images uint8, features fp32) and `bank.json` (version,
encoder, names). Nothing is pickled, so a bank from a stranger cannot run code.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .filters import Filter

VERSION = 1
BATCH = 32


@dataclass(frozen=True)
class Encoder:
    """An image encoder and the name by which a bank knows whose its features are.

    Attributes:
        name: says model and preprocessing; features of other names are not compared.
        encode: `(B, 3, H, W)` in [0, 1] -> `(B, C)`; a callable or a torch module.
    """

    name: str
    encode: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features `(B, C)` fp32, in batches of 32."""
        parts = [self.encode(part) for part in images.split(BATCH)]
        features = torch.cat([part.detach().float() for part in parts])
        if features.dim() != 2 or len(features) != len(images):
            raise ValueError(
                f"the encoder {self.name!r} must return (B, C); for {len(images)} images it "
                f"returned {tuple(features.shape)}"
            )
        return features


def default_encoder() -> Encoder:
    """EfficientNet-lite0 at 96 px with ImageNet weights, which come with the extra `demo`."""
    from ..studies.measures import FEATURE_SIZE, FeatureExtractor

    return Encoder(f"efficientnet-lite0@{FEATURE_SIZE}", FeatureExtractor())


@dataclass(frozen=True)
class ReferenceBank:
    """Images with names and, where an encoder was given, features.

    Attributes:
        names: one for each image, unique; file names relative to the folder they came from.
        images: `(K, 3, S, S)` uint8.
        features: `(K, C)` fp32 of `encoder`, or None.
        encoder: name of the encoder of `features`, or None.
        skipped: what could not be read when the bank was built, and why: `{name: reason}`.
    """

    names: tuple[str, ...]
    images: Tensor
    features: Tensor | None = None
    encoder: str | None = None
    skipped: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
            raise ValueError(f"images must be (K, 3, S, S) uint8, got {self.images.dtype} {shape}")
        if len(self.names) != len(self.images) or len(set(self.names)) != len(self.names):
            raise ValueError(
                f"{len(self.images)} images need as many different names, got {len(self.names)} "
                f"with {len(set(self.names))} different"
            )
        if not self.names:
            raise ValueError("a bank needs at least one image")
        if self.features is not None and (
            self.features.dim() != 2 or len(self.features) != len(self.names)
        ):
            raise ValueError(
                f"features must be ({len(self.names)}, C), got {tuple(self.features.shape)}"
            )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def pixels(self) -> Tensor:
        """All images in [0, 1], `(K, 3, S, S)` fp32: four times the memory of `images`."""
        return self.images.float() / 255

    @classmethod
    def build(
        cls,
        images: str | Path | Iterable[Any],
        *,
        size: int = 512,
        encoder: Encoder | None = None,
    ) -> ReferenceBank:
        """A bank from a folder (searched in depth) or from images.

        Args:
            images: a folder, or images: PIL, paths, or uint8 arrays `(H, W, 3)`; or pairs of a
                name and one of these. Unnamed ones are called by their number or their path.
            size: images are cropped to the central square and resized to this many pixels.
            encoder: whose features are kept; None keeps none.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: nothing in it could be read. Single files that cannot are left out with a
                warning that names them; `skipped` says why.
        """
        kept: list[Tensor] = []
        names: list[str] = []
        skipped: list[tuple[str, str]] = []
        for name, source in named_images(images):
            try:
                kept.append(_square(source, size))
            except Exception as error:  # decoders of corrupt files raise whatever they like
                skipped.append((name, str(error) or type(error).__name__))
                continue
            names.append(name)
        if skipped:
            told = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
            more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
            warnings.warn(f"left out of the bank: {told}{more}", UserWarning, stacklevel=2)
        if not kept:
            raise ValueError(f"no image in {images if isinstance(images, (str, Path)) else 'it'}")
        built = cls(tuple(names), torch.stack(kept), skipped=tuple(skipped))
        return built if encoder is None else built.with_features(encoder)

    def with_features(self, encoder: Encoder) -> ReferenceBank:
        """The bank with this encoder's features; itself where it has them."""
        if self.features is not None and self.encoder == encoder.name:
            return self
        parts = [encoder(part.float() / 255).cpu() for part in self.images.split(BATCH)]
        return ReferenceBank(self.names, self.images, torch.cat(parts), encoder.name, self.skipped)

    def passing(self, filters: Sequence[Filter]) -> ReferenceBank:
        """The images on which no filter triggers: desired ones must not be undesired themselves.

        Raises:
            ValueError: every image is flagged.
        """
        from .filters import judge

        passed = []
        for part in self.images.split(BATCH):
            passed += [not rows[-1].triggered for rows in judge(filters, part.float() / 255)]
        kept = torch.tensor(passed)
        if not bool(kept.any()):
            raise ValueError(f"the filters flag all {len(self)} images of the bank")
        names = tuple(name for name, ok in zip(self.names, passed, strict=True) if ok)
        features = None if self.features is None else self.features[kept]
        return ReferenceBank(names, self.images[kept], features, self.encoder, self.skipped)

    def thumbnails(self, size: int | tuple[int, int]) -> Tensor:
        """The images at `size` pixels (a side, or height and width) in [0, 1], `(K, 3, h, w)` fp32.

        Made a few at a time: the whole bank is never held in floating point at its own size.
        """
        parts = self.images.split(BATCH)
        return torch.cat([resized(part.float() / 255, size) for part in parts])

    def save(self, folder: str | Path) -> None:
        """Writes `bank.safetensors` and `bank.json`; what was there is replaced when both are."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"images": self.images.contiguous()}
        if self.features is not None:
            tensors["features"] = self.features.contiguous()
        description = {
            "format": "negtome_fast.ReferenceBank",
            "version": VERSION,
            "encoder": self.encoder,
            "names": list(self.names),
            "skipped": [list(row) for row in self.skipped],
        }
        partial = folder / "bank.safetensors.partial"
        save_file(tensors, partial)
        text = folder / "bank.json.partial"
        text.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, folder / "bank.safetensors")
        os.replace(text, folder / "bank.json")

    @classmethod
    def load(cls, folder: str | Path, encoder: Encoder | None = None) -> ReferenceBank:
        """Reads a saved bank.

        Args:
            folder: where `save` wrote.
            encoder: whose features are wanted; features of another encoder are an error.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is corrupt, of another version, or holds another encoder's features.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in ("bank.json", "bank.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is not a reference bank: it has no {name}")
        try:
            description = json.loads((folder / "bank.json").read_text(encoding="utf-8"))
            version, names = description["version"], tuple(description["names"])
            own = description["encoder"]
            skipped = tuple((str(a), str(b)) for a, b in description["skipped"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / 'bank.json'} is corrupt: {error!r}") from error
        if version != VERSION:
            raise ValueError(
                f"{folder} is a bank of version {version}, this is version {VERSION}; build it anew"
            )
        if encoder is not None and own is not None and own != encoder.name:
            raise ValueError(
                f"the features in {folder} are of the encoder {own!r}, not of {encoder.name!r}; "
                "build the bank anew with it"
            )
        try:
            tensors = load_file(folder / "bank.safetensors")
            return cls(names, tensors["images"], tensors.get("features"), own, skipped)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{folder / 'bank.safetensors'} is corrupt: {error}") from error


def resized(images: Tensor, size: int | tuple[int, ...]) -> Tensor:
    """Images `(B, C, H, W)` at `size` pixels (a side, or height and width), antialiased."""
    size = (size, size) if isinstance(size, int) else size
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def named_images(images: str | Path | Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Names and sources of the images of a folder, searched in depth, or of an iterable."""
    if isinstance(images, (str, Path)):
        from ..pipelines.pictures import IMAGE_SUFFIXES

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


def _square(source: Any, size: int) -> Tensor:
    """The central square of an image, `(3, size, size)` uint8."""
    from PIL import Image

    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise TypeError(f"an array must be (H, W, 3) uint8, got {source.dtype} {source.shape}")
        image = Image.fromarray(source)
    elif isinstance(source, (str, Path)):
        with Image.open(source) as opened:
            image = opened.convert("RGB")
    elif isinstance(source, Image.Image):
        image = source.convert("RGB")
    else:
        raise TypeError(f"not an image: {type(source).__name__}")
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
