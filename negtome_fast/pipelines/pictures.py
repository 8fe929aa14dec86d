"""Pictures of references: images, videos and masks from files, arrays or PIL."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    Picture: TypeAlias = Image | np.ndarray[Any, Any] | str | Path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MOST_FRAMES = 20
"""How many of the largest images' pixels an animated image may have in all."""

VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v")


def read_frames(source: Any, what: str) -> tuple[Image, ...]:
    """Returns the RGB frames of a picture or video.

    Args:
        source: a PIL image, a uint8 array, a path, or a sequence of these.
        what: what `source` is, for errors.
    """
    return tuple(frame.convert("RGB") for frame in _pictures(source, what))


def to_pixels(frames: Sequence[Image], size: tuple[int, int, int]) -> Tensor:
    """Returns RGB frames as (F, 3, H, W) in [-1, 1].

    Args:
        frames: images of any size.
        size: (frames, height, width) of the run.
    """
    import numpy as np
    from PIL import Image

    count, height, width = size
    last = len(frames) - 1
    chosen = [frames[round(i * last / max(count - 1, 1))] for i in range(count)]
    resized = [f.resize((width, height), Image.Resampling.LANCZOS) for f in chosen]
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in resized]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def read_mask(source: Any) -> Tensor:
    """Returns bool (F, H, W): the white part of a picture, or a bool array or tensor."""
    import numpy as np

    if isinstance(source, (Tensor, np.ndarray)) and source.dtype in (torch.bool, np.dtype(bool)):
        mask = torch.as_tensor(source).cpu()
        mask = mask[None] if mask.ndim == 2 else mask
        if mask.ndim != 3:
            raise ValueError(f"a bool mask must be (H, W) or (F, H, W), not {tuple(mask.shape)}")
    else:
        grey = [np.asarray(frame.convert("L")) for frame in _pictures(source, "mask")]
        if len({frame.shape for frame in grey}) > 1:
            raise ValueError("the frames of a mask have different sizes")
        mask = torch.from_numpy(np.stack(grey) > 127)
    if not mask.any():
        raise ValueError(
            f"the mask{_named(source)} is black everywhere, so nothing of the reference could be "
            "matched; white marks what may be"
        )
    return mask


def _named(source: Any) -> str:
    return f" {source}" if isinstance(source, (str, Path)) else ""


def _pictures(source: Any, what: str) -> list[Image]:
    """Returns a picture, or the frames of a video, as PIL images."""
    import numpy as np
    from PIL import Image

    if isinstance(source, Image.Image):
        if not source.width * source.height:
            raise ValueError(f"a {what} must have pixels; this one is {source.size}")
        return [source]
    if isinstance(source, (str, Path)):
        return _read(Path(source), what)
    if isinstance(source, np.ndarray):
        frames = source if source.ndim == 4 else source[None]
        grey = what == "mask" and source.ndim == 2
        if source.dtype != np.uint8 or not (grey or (frames.ndim == 4 and frames.shape[3] == 3)):
            raise ValueError(
                f"a {what} that is an array must be uint8 (H, W, 3) or (F, H, W, 3), not "
                f"{source.dtype} {source.shape}"
            )
        if not source.size:
            raise ValueError(f"a {what} must have pixels; this array is {source.shape}")
        return [Image.fromarray(frame) for frame in frames]
    if isinstance(source, Sequence) and source:
        return [picture for entry in source for picture in _pictures(entry, what)]
    raise TypeError(
        f"a {what} must be a PIL image, a uint8 array, a path or a sequence of these, not "
        f"{type(source).__name__}" + (" without entries" if isinstance(source, Sequence) else "")
    )


def _read(path: Path, what: str) -> list[Image]:
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise ValueError(f"the folder {path} of the {what} holds no images")
        return [frame for file in files for frame in _read(file, what)]
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} at {path}")
    return _read_video(path) if path.suffix.lower() in VIDEO_SUFFIXES else read_file(path, what)


def read_file(path: Path, what: str) -> list[Image]:
    """Returns the frames of an image's file, upright.

    Args:
        path: the file.
        what: what it is, for errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no image, is damaged, or has more pixels than Pillow takes for safe
            (`PIL.Image.MAX_IMAGE_PIXELS`), in a frame or, 20-fold, in all; names the file.
    """
    from PIL import Image, ImageOps, ImageSequence

    frames, pixels, most = [], 0, Image.MAX_IMAGE_PIXELS
    with opened(path, what) as image:
        for frame in ImageSequence.Iterator(image):
            pixels += frame.width * frame.height
            if most is not None and pixels > _MOST_FRAMES * most:
                raise ValueError(f"its frames have more than {_MOST_FRAMES * most} pixels")
            frames.append(ImageOps.exif_transpose(frame.copy()))
    return frames


@contextmanager
def opened(path: Path, what: str) -> Iterator[Image]:
    """Yields the image of a file; errors while it is read name the file, as in `read_file`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path} is not an image that can be read; give the {what} as PNG, JPEG or WebP, and a "
            "video as a GIF or a folder of frames"
        ) from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        found = re.search(r"\d+", str(error))
        raise ValueError(
            f"the {what} {path} is too large: {found[0] if found else 'too many'} pixels; at most "
            f"{Image.MAX_IMAGE_PIXELS} are read. Make it smaller"
        ) from error
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders of damaged files raise whatever they like
        raise ValueError(f"the {what} {path} cannot be read: {error}") from error


def _read_video(path: Path) -> list[Image]:
    from PIL import Image

    try:
        imageio = import_module("imageio.v3")
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs imageio: pip install 'imageio[pyav]'; or give the video as a "
            "GIF or a folder of frames"
        ) from error
    try:
        frames = [Image.fromarray(frame) for frame in imageio.imiter(path)]
    except ImportError:
        raise
    except Exception as error:  # as above
        raise ValueError(f"the video {path} cannot be read: {error}") from error
    if not frames:
        raise ValueError(f"the video {path} has no frames")
    return frames
