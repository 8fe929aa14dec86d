"""Labelled sheets of images: rows with headings, a title above and the settings below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..pipelines.pictures import read_frames

if TYPE_CHECKING:
    from PIL.Image import Image

    from .settings import ReferenceFile

ACCENT = "#0b57d0"
GREY = "#444444"


@dataclass(frozen=True)
class Row:
    """A row of images of one size under a heading; `accent` marks guided ones."""

    heading: str
    images: Sequence[Image]
    accent: bool = False


def sheet(title: str, rows: Sequence[Row], footer: str, tile: int = 160) -> Image:
    """Draw the rows below each other; the longer side of every image is `tile` pixels.

    Small images are enlarged without smoothing, so that their pixels stay visible.
    """
    from PIL import Image, ImageDraw, ImageFont

    gap, margin, head = 8, 24, 28
    fitted = [[_fitted(image, tile) for image in row.images] for row in rows]
    title_font, font, small = (ImageFont.load_default(size=s) for s in (20, 16, 13))
    widths = [sum(image.width + gap for image in images) - gap for images in fitted]
    headings = [round(font.getlength(row.heading)) for row in rows]
    width = max([420, *widths, *headings]) + 2 * margin
    title_lines = textwrap.wrap(title, max(20, (width - 2 * margin) // 10)) or [""]
    footer_lines = textwrap.wrap(footer, max(20, (width - 2 * margin) // 7))
    heights = [head + max([0, *(image.height for image in images)]) + gap for images in fitted]
    top = 14 + 26 * len(title_lines)
    picture = Image.new("RGB", (width, top + sum(heights) + 20 * len(footer_lines) + 20), "white")
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(title_lines):
        draw.text((margin, 12 + 26 * number), line, "black", font=title_font)
    for row, images, height in zip(rows, fitted, heights, strict=True):
        draw.text((margin, top + 4), row.heading, ACCENT if row.accent else "black", font=font)
        left = margin
        for image in images:
            picture.paste(image, (left, top + head))
            left += image.width + gap
        top += height
    for number, line in enumerate(footer_lines):
        draw.text((margin, top + 8 + 20 * number), line, GREY, font=small)
    return picture


def reference_rows(references: Sequence[ReferenceFile]) -> list[Row]:
    """Rows of a sheet with every reference that is a file, and its mask; of videos one frame."""
    from .media import still

    rows = []
    for entry in references:
        if Path(entry.image).is_file():
            shown = [still(read_frames(entry.image, "reference image"))]
            if entry.mask is not None and Path(entry.mask).is_file():
                shown.append(still(read_frames(entry.mask, "mask")).resize(shown[0].size))
            rows.append(Row("reference" + (" and mask" if entry.mask else ""), shown))
    return rows


def _fitted(image: Image, tile: int) -> Image:
    from PIL import Image as Pillow

    scale = tile / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resampling = Pillow.Resampling.NEAREST if scale >= 1 else Pillow.Resampling.LANCZOS
    return image.convert("RGB").resize(size, resampling)
