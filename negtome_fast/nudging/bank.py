"""`ReferenceBank`: undesired or desired images and their features, saved as a folder of two files.

`bank.safetensors` holds images (uint8) and features (fp32), `bank.json` version, encoder and names.
Nothing is pickled, so a stranger's bank cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import partial_of, remove_abandoned
from .encoders import ImageEncoder
from .images import BATCH, check_side, named_images, resized, square
from .verdicts import Filter, judge

VERSION = 1


@dataclass(frozen=True)
class ReferenceBank:
    """Images with names and, if an encoder was given, features.

    Attributes:
        names: a unique name for each image; file names are relative to the folder of the images.
        images: `(K, 3, S, S)` uint8.
        features: `(K, C)` fp32 from `encoder`, or None.
        encoder: name of the encoder of `features`, or None.
        skipped: (name, reason) of each image that could not be read when the bank was built.
    """

    names: tuple[str, ...]
    images: Tensor
    features: Tensor | None = None
    encoder: str | None = None
    skipped: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("images", self.images), ("features", self.features)):
            if not isinstance(value, Tensor) and (value is not None or name == "images"):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
            raise ValueError(f"images must be (K, 3, S, S) uint8, got {self.images.dtype} {shape}")
        if 0 in shape[2:]:
            raise ValueError(f"images must have pixels, got {shape[2]} x {shape[3]}")
        if len(self.names) != len(self.images) or len(set(self.names)) != len(self.names):
            raise ValueError(
                f"{len(self.images)} images need as many different names, got {len(self.names)} "
                f"with {len(set(self.names))} different"
            )
        if not self.names:
            raise ValueError("a bank needs at least one image")
        if not all(isinstance(name, str) for name in self.names):
            raise TypeError(f"names must be strings, got {self.names!r:.80}")
        if self.features is not None and (
            self.features.dim() != 2 or len(self.features) != len(self.names)
        ):
            raise ValueError(
                f"features must be ({len(self.names)}, C), got {tuple(self.features.shape)}"
            )
        if self.features is not None:
            _check_features(self.names, self.features)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def pixels(self) -> Tensor:
        """All images in [0, 1], `(K, 3, S, S)` fp32; needs four times the memory of `images`."""
        return self.images.float() / 255

    @classmethod
    def build(
        cls,
        images: str | Path | Iterable[Any],
        *,
        size: int = 512,
        encoder: ImageEncoder | None = None,
    ) -> ReferenceBank:
        """Build a bank from a folder (searched recursively) or from images.

        Args:
            images: a folder, or images: PIL, paths, uint8 arrays `(H, W, 3)`, or pairs of a name
                and one of these. An image without a name gets its number or path.
            size: side in pixels; images are cropped to the central square and resized.
            encoder: encoder whose features are kept; None keeps none.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: nothing in it could be read, or `size` is not 1 to `MOST_PIXELS`. If only
                some files cannot be read, a warning names them, and `skipped` says why.
        """
        check_side("size", size)
        kept: list[Tensor] = []
        names: list[str] = []
        skipped: list[tuple[str, str]] = []
        for name, source in named_images(images):
            try:
                kept.append(square(source, size))
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

    def with_features(self, encoder: ImageEncoder) -> ReferenceBank:
        """Return the bank with this encoder's features, or itself if it has them."""
        if not isinstance(encoder, ImageEncoder):
            raise TypeError(f"encoder must be an ImageEncoder, got {type(encoder).__name__}")
        if self.features is not None and self.encoder == encoder.name:
            return self
        parts = [encoder(part.float() / 255).cpu() for part in self.images.split(BATCH)]
        return ReferenceBank(self.names, self.images, torch.cat(parts), encoder.name, self.skipped)

    def passing(self, filters: Sequence[Filter]) -> ReferenceBank:
        """Return a bank of the images on which no filter triggers.

        Desired images must not be undesired themselves.

        Raises:
            ValueError: every image is flagged.
        """
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
        """Return the images resized to `size`, `(K, 3, h, w)` fp32 in [0, 1].

        They are resized a few at a time, so that the whole bank is never held in floating point.

        Args:
            size: pixels: a side, or height and width.
        """
        for side in (size,) if isinstance(size, int) else size:
            check_side("size", side)
        parts = self.images.split(BATCH)
        return torch.cat([resized(part.float() / 255, size) for part in parts])

    def save(self, folder: str | Path) -> None:
        """Write `bank.safetensors` and `bank.json`, each of which appears whole or not at all.

        `bank.json` has a checksum of the other file, so that two files of different banks, which a
        killed process may leave, are not taken for one bank.

        Raises:
            OSError: the folder cannot be written to, or the disk is full; an earlier bank stays.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        for name in ("bank.safetensors.partial", "bank.json.partial"):  # of earlier versions
            (folder / name).unlink(missing_ok=True)
        path = folder / "bank.safetensors"
        partial = partial_of(path)
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
        text = partial_of(folder / "bank.json")
        try:
            save_file(tensors, partial)
            description["sha256"] = _sha256(partial)
            text.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, path)
            os.replace(text, folder / "bank.json")
        except SafetensorError as error:
            raise OSError(f"the bank {folder} cannot be written: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
            text.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | Path, encoder: ImageEncoder | None = None) -> ReferenceBank:
        """Load a saved bank.

        Args:
            folder: the folder that `save` wrote.
            encoder: encoder whose features are needed; features of another one are an error.

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
            version, names = description["version"], tuple(map(_text, description["names"]))
            own = None if description["encoder"] is None else _text(description["encoder"])
            checksum = description.get("sha256")  # older banks have none
            skipped = tuple((str(a), str(b)) for a, b in description["skipped"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{folder / 'bank.json'} is corrupt: {error!r}") from error
        if version != VERSION:
            raise ValueError(
                f"{folder} is a bank of version {version}, this package reads version {VERSION}; "
                "build it again"
            )
        if encoder is not None and own is not None and own != encoder.name:
            raise ValueError(
                f"the features in {folder} are of the encoder {own!r}, not of {encoder.name!r}; "
                "build the bank again with it"
            )
        try:
            tensors = load_file(folder / "bank.safetensors")
            images, features = tensors["images"], tensors.get("features")
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{folder / 'bank.safetensors'} is corrupt: {error}") from error
        if checksum is not None and checksum != _sha256(folder / "bank.safetensors"):
            raise ValueError(
                f"the two files of the bank {folder} do not belong together: bank.json has the "
                "checksum of other images. Saving was interrupted, or a file was replaced; build "
                "the bank again"
            )
        try:
            return cls(names, images, features, own, skipped)
        except ValueError as error:
            raise ValueError(f"{folder / 'bank.safetensors'} is corrupt: {error}") from error


def _check_features(names: Sequence[str], features: Tensor) -> None:
    if not features.shape[1] or not features.is_floating_point():
        raise ValueError(
            f"features must be floating-point numbers, at least one for each image, got "
            f"{features.dtype} {tuple(features.shape)}"
        )
    finite = features.isfinite().all(dim=1)
    if not bool(finite.all()):
        name = names[int(finite.int().argmin())]
        raise ValueError(f"the features of {name!r} are not finite, so they compare with nothing")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is not a string")
    return value


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()
