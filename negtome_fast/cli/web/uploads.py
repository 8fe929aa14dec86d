"""Uploaded pictures: limits that are checked before pixels are read, and the painted mask.

A request has a picture and one layer of paint. What the editor sends on top, the picture with the
paint, is not kept.
"""

from __future__ import annotations

import html
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_BYTES = 10 * 2**20
MOST_PIXELS = 16 * 10**6
"""Limits of an uploaded picture, and of the layer on it."""
MOST_LAYERS = 1
MOST_WAITING = 8
"""Number of pictures that may wait in memory for the request that they belong to."""
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


def check_layers(layers: Sequence[Any]) -> None:
    """Raise `ValueError` if there are more layers than one, before any is read."""
    if len(layers) > MOST_LAYERS:
        raise ValueError(f"the picture has {len(layers)} layers of paint; {MOST_LAYERS} is allowed")


def drawn_mask(layers: Sequence[Image]) -> Image | None:
    """Return a mask, white where the layer was painted on; None if nothing was painted.

    Raises:
        ValueError: there are several layers.
    """
    check_layers(layers)
    for layer in layers:
        painted = layer.convert("RGBA").getchannel("A").point(lambda value: 255 * (value > 127))
        return painted if painted.getbbox() else None
    return None


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
        if payload is None:
            return read(payload)
        sent = payload if payload.id is None else editor.blob_storage.get(payload.id)
        try:
            if sent is not None:
                sent.composite = None  # of no use, and as large as the picture
                sent.layers = [layer for layer in sent.layers or [] if layer is not None]
                check_layers(sent.layers)
                for part in (sent.background, *sent.layers):
                    if part is not None:
                        check_picture(part if isinstance(part, bytes) else Path(part.path))
        except FileNotFoundError:
            lost = ValueError("the picture is no longer here: upload it again")
            raise shown_error(gr, lost) from None
        except ValueError as error:
            raise shown_error(gr, error) from None
        return read(payload)

    return preprocess


def checked_receiving(editor: Any) -> Callable[[Any], None]:
    """Return the editor's function that takes a picture or a layer from the page, with limits.

    gradio's own keeps any number of any size for good.
    """
    take, waiting = editor.accept_blobs, editor.blob_storage

    def accept_blobs(data: Any) -> None:
        kind = data.data.get("type")
        if kind == "composite":
            return
        if kind == "layer" and str(data.data.get("index")) != "0":
            raise ValueError(f"a picture has {MOST_LAYERS} layer of paint")
        check_picture(data.files[0][1])
        while len(waiting) >= MOST_WAITING and data.data.get("id") not in waiting:
            waiting.pop(next(iter(waiting)))
        take(data)

    accept_blobs._is_server_fn = True  # type: ignore[attr-defined]
    return accept_blobs


async def local_only(path: Any) -> str | None:
    """Return the path of an uploaded file; gradio's own also fetches addresses of the network.

    Raises:
        ValueError: it is an address.
    """
    if path is not None and "://" in str(path):
        raise ValueError("a picture must be uploaded; addresses are not fetched")
    return None if path is None else str(path)
