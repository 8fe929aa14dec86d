"""The shapes that a run measures, by importance: shapes of models, then growth along one axis."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..compared import shapes
from ..compared.shapes import Shape

SERIES = {
    "shapes": "hidden states of models",
    "tokens": "2 items of 640 channels, 256 to 65,536 tokens",
    "batch": "1,024 tokens of 640 channels, 2 to 32 items",
    "channels": "2 items of 2,048 tokens, 64 to 5,120 channels",
    "independent": "shapes of models whose tokens do not resemble each other, on a CPU",
}
SWEPT = ("authors", "split", "matmul")
"""Rivals in a sweep, which shows how cost grows; the shapes of models have all rivals."""


@dataclass(frozen=True)
class Entry:
    """One shape to measure; None leaves a choice to the run."""

    shape: Shape
    series: str = "shapes"
    dtype: str | None = None
    against: tuple[str, ...] | None = None
    seconds: float | None = None
    memory: bool = True


def _sweep(series: str, sizes: Iterable[Shape], seconds: float, memory: bool) -> tuple[Entry, ...]:
    return tuple(Entry(size, series, None, SWEPT, seconds, memory) for size in sizes)


def sweeps(seconds: float) -> tuple[Entry, ...]:
    """Growth with the tokens (with memory), with the batch and with the channels."""
    tokens = (Shape(f"{n} tokens", 2, n, 640) for n in (2**k for k in range(8, 17)))
    batch = (Shape(f"batch of {b}", b, 1024, 640) for b in (2, 4, 8, 16, 32))
    channels = (Shape(f"{d} channels", 2, 2048, d) for d in (64, 320, 640, 1280, 3072, 5120))
    return (
        *_sweep("tokens", tokens, seconds, memory=True),
        *_sweep("batch", batch, seconds, memory=False),
        *_sweep("channels", channels, seconds, memory=False),
    )


GPU = (
    *map(
        Entry,
        (
            shapes.FLUX_1024,
            shapes.FLUX_1024_OTHERS,
            shapes.SDXL_64,
            shapes.SDXL_32,
            shapes.FLUX_768,
            shapes.SD3_1024,
            shapes.QWEN_1328,
            shapes.LTX_121,
            shapes.WAN_480,
            shapes.WAN_720,
        ),
    ),
    *sweeps(seconds=1.0),
)
# Without bf16 instructions a library takes half a minute for one bf16 product of this size, so
# FLUX has one rival. Large shapes come last, for machines that have the time.
CPU = (
    Entry(shapes.SDXL_64_ONE_GROUP),
    Entry(shapes.SDXL_32_ONE_GROUP),
    Entry(shapes.FLUX_768, dtype="bfloat16", against=("authors",)),
    # The time of the CPU's coarse product depends on the tokens.
    *(
        Entry(replace(shape, independent=True), "independent", dtype, ("authors",), 5.0, False)
        for shape, dtype in (
            (shapes.SDXL_64_ONE_GROUP, None),
            (shapes.SDXL_32_ONE_GROUP, None),
            (shapes.FLUX_768, "bfloat16"),
        )
    ),
    *sweeps(seconds=1.0),
    Entry(shapes.SDXL_32, seconds=6.0),
    Entry(shapes.SD3_512, seconds=6.0),
    Entry(shapes.FLUX_768, against=SWEPT),
    Entry(shapes.SDXL_64, against=SWEPT),
)
QUICK = tuple(map(Entry, shapes.QUICK_SHAPES))
