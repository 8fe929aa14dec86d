"""Uploaded pictures: limits that are checked before pixels are read, and the painted mask."""

from __future__ import annotations

import html
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_BYTES = 10 * 2**20
MOST_PIXELS = 16 * 10**6
"""Limits of an uploaded picture."""
FORMATS = ("PNG", "JPEG", "WEBP")


def check_picture(source: Path | bytes) -> None:
    """Check an upload before its pixels are read.

    Raises:
        ValueError: it is too large or not a picture; says what is allowed.
    """
    from PIL import Image

    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"the file has {size / 2**20:.1f} MiB; {MOST_BYTES // 2**20} are allowed")
    stream: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # counted below
            with Image.open(stream, formats=FORMATS) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        most = MOST_PIXELS // 10**6
        raise ValueError(f"the picture has more than {most} million pixels") from None
    except (OSError, SyntaxError, ValueError):
        raise ValueError(f"the file is not a readable picture: {', '.join(FORMATS)}") from None
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"the picture has {width} x {height} pixels; {MOST_PIXELS // 10**6} million are allowed"
        )


def drawn_mask(layers: list[Image]) -> Image | None:
    """Return a mask, white where any layer was painted on; None if nothing was painted."""
    from PIL import Image, ImageChops

    mask = None
    for layer in layers:
        painted = layer.convert("RGBA").getchannel("A").point(lambda value: 255 * (value > 127))
        mask = painted if mask is None else ImageChops.lighter(mask, painted.resize(mask.size))
    return mask if isinstance(mask, Image.Image) and mask.getbbox() else None


def shown_error(gr: Any, error: Exception) -> Any:
    """Return the error as gradio shows it, with its text escaped, since gradio expects HTML."""
    return gr.Error(html.escape(str(error), quote=False), duration=None, print_exception=False)


def checked_reading(gr: Any, editor: Any) -> Callable[[Any], Any]:
    """Return the editor's function that reads what was sent, with a check before it.

    It replaces the method of one object, because gradio writes a file of stubs beside the source
    of each derived class.
    """
    read = editor.preprocess

    def preprocess(payload: Any) -> Any:
        if payload is not None:
            sent = editor.blob_storage.get(payload.id) if payload.id is not None else payload
            parts = [sent.background, *(sent.layers or []), sent.composite] if sent else []
            try:
                for part in parts:
                    if part is not None:
                        check_picture(part if isinstance(part, bytes) else Path(part.path))
            except ValueError as error:
                raise shown_error(gr, error) from None
        return read(payload)

    return preprocess
