"""Shapes to tune for, and the configurations that can fit a target by arithmetic alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import shorten

from ..kernels import aot, tuning
from ..kernels.tuning import Config, Problem

#: Largest number of tokens of a shape for which mode "others" is tuned.
MOST_FOR_OTHERS = 16384
#: Largest number of elements of a shape: 128 GiB of 2-byte elements, what a GPU can hold.
MOST_ELEMENTS = 2**36
#: Largest number of items, tokens or channels.
MOST = 2**24


@dataclass(frozen=True)
class TokenShape:
    """Image tokens (items, tokens, channels) in equal groups."""

    items: int
    tokens: int
    channels: int
    groups: int = 1

    def problem(self, dtype: str, others: bool = False) -> Problem:
        """Problem of the tables for this shape, in mode "first" or "others"."""
        size = self.items // self.groups
        products = self.groups * (size * (size - 1) if others else size - 1)
        return Problem(dtype, products, self.tokens, self.tokens, self.channels)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Kernels to tune; `pairs`, for mode "others", only where comparing it is affordable."""
        return tuple(k for k in tuning.TUNED if k != "pairs" or self.tokens <= MOST_FOR_OTHERS)

    def __str__(self) -> str:
        size = f"{self.items}x{self.tokens}x{self.channels}"
        return size if self.groups == 1 else f"{size}/{self.groups}"


#: FLUX 1024 px, SDXL 1024 px at both grids, FLUX 768 px, SD3, Wan 720p; most important first.
SHAPES = (
    TokenShape(4, 4096, 3072),
    TokenShape(8, 4096, 640, 2),
    TokenShape(8, 1024, 1280, 2),
    TokenShape(4, 2304, 3072),
    TokenShape(4, 4096, 1536),
    TokenShape(4, 256, 640),
    TokenShape(2, 75600, 5120),
)


def parse_shape(text: str) -> TokenShape:
    """Read `"4x4096x640"`, or `"8x4096x640/2"` with two groups.

    Raises:
        ValueError: the text is not such a shape, a group has fewer than two items, or the tokens
            would fill more memory than a GPU has.
    """
    found = re.fullmatch(r"(\d{1,12})x(\d{1,12})x(\d{1,12})(?:/(\d{1,12}))?", text)
    if not found:
        raise ValueError(
            f"`shapes` {shorten(text, 60)!r} is not ITEMSxTOKENSxCHANNELS or .../GROUPS"
        )
    items, tokens, channels, groups = (int(part or 1) for part in found.groups())
    if min(items, tokens, channels, groups) < 1 or items % groups or items == groups:
        raise ValueError(f"`shapes` {text!r} needs 2 or more items in each of its equal groups")
    if max(items, tokens, channels) > MOST or items * tokens * channels > MOST_ELEMENTS:
        raise ValueError(
            f"`shapes` {text!r} is too large: at most {MOST:,} of each, and {MOST_ELEMENTS:,} "
            "elements, which fill a GPU"
        )
    return TokenShape(items, tokens, channels, groups)


def space(kernel: str) -> Iterator[Config]:
    """All configurations of a kernel before any pruning."""
    if kernel == "push_from_keys":
        for rows, channels, warps in itertools.product((1, 4, 8, 16), (256, 512, 1024), (4, 8)):
            yield Config(rows, 0, channels, warps, 1)
        return
    blocks = itertools.product((32, 64, 128, 256), (32, 64, 128, 256), (16, 32, 64, 128))
    for (rows, columns, channels), warps, stages in itertools.product(blocks, (4, 8), (2, 3, 4, 5)):
        if kernel == "fused":
            yield Config(rows, columns, channels, warps, stages)
            continue
        for group, resident in itertools.product((8, 16), (1, 2)):
            some = Config(rows, columns, channels, warps, stages, group, resident)
            yield some
            yield some._replace(DESCRIPTORS=1)
            yield some._replace(DESCRIPTORS=1, FLATTEN=1)


def is_hopper(target: aot.Target) -> bool:
    """Return True if tensor cores read both operands from shared memory: Hopper and later."""
    return target.backend == "cuda" and isinstance(target.arch, int) and target.arch >= 90


def shared_bytes(config: Config, dtype: str, arch: str) -> int:
    """Bytes of shared memory that the pipeline of a matching kernel needs."""
    # Only Hopper and later keep all stages in shared memory.
    stages = config.num_stages if is_hopper(aot.TARGETS[arch]) else config.num_stages - 1
    elements = (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K
    return elements * tuning.element_size(dtype) * max(stages, 1)


def fits(config: Config, kernel: str, dtype: str, arch: str) -> bool:
    """Return True if a configuration can be worth compiling, by arithmetic alone.

    Conditions: all stages, also of CTAS_PER_SM programs together, fit shared memory. A thread has
    at least 4 accumulators, and they take at most half of its registers. A step reads at least 64
    bytes of a token. Tiles on tensor cores do at least 32 multiply-adds for each element read.
    Descriptors need hardware that has them, and blocks that fit their 128-byte swizzle.
    """
    target = aot.TARGETS[arch]
    threads = config.num_warps * target.warp_size
    if kernel == "push_from_keys":
        per_thread = config.BLOCK_M * config.BLOCK_K / threads
        return 4 <= per_thread <= 32
    size = tuning.element_size(dtype)
    shared = shared_bytes(config, dtype, arch)
    if shared > target.shared_limit:
        return False
    if config.CTAS_PER_SM * (shared + target.shared_reserved) > target.shared_total:
        return False
    accumulators = config.BLOCK_M * config.BLOCK_N / threads
    if not 4 <= accumulators <= 128 / config.CTAS_PER_SM or config.BLOCK_K * size < 64:
        return False
    reads = config.BLOCK_M + config.BLOCK_N
    if kernel != "fused" and size == 2 and 32 * reads > config.BLOCK_M * config.BLOCK_N:
        return False
    if dtype == "float32" and target.backend == "cuda" and config.num_stages > 2:
        return False  # no tensor cores to keep busy: deeper pipelines only cost memory
    if config.DESCRIPTORS:
        return is_hopper(target) and size == 2 and config.BLOCK_K * size <= 128
    return True
