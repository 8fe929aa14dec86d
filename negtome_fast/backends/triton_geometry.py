"""The launches of a call, which its shapes, strides and settings determine.

A `Geometry` is worked out once and kept, since a model calls the operator with the same few shapes
in every block and step. It holds no tensors.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..kernels import tuning
from ..pairing import Pairing
from . import triton_runtime as runtime
from .triton_descriptors import template
from .triton_launch import Launch

#: For OVERLAP: the time of a token's push, divided by that of its matching and multiplied by the
#: number of reference tokens. A push moves 6 bytes a channel at 3 TB/s; matching takes 2 operations
#: a channel and reference token at 700 TFLOP/s.
PUSH_BY_MATCHING = 700
#: kernels/coarse.py bounds the errors of sums of fewer channels than this.
MOST_COARSE_CHANNELS = 2**15 - 1
#: Strides of a tensor.
Strides = tuple[int, ...]


@dataclass(frozen=True)
class Tokens:
    """Shape and strides of tokens (P, M, D)."""

    shape: tuple[int, ...]
    strides: Strides

    @classmethod
    def of(cls, tensor: Tensor) -> Tokens:
        return cls(tuple(tensor.shape), tensor.stride())


@dataclass(frozen=True)
class Push:
    """The layout of what a push reads and writes.

    Attributes:
        out: strides of the output.
        inplace: True if the output is `x` itself.
        numbers: True if alpha and threshold are numbers of the host.
        strides: strides of alpha and threshold over the slots, if they are tensors.
        source_mask: strides of the mask of tokens that may move, or None.
    """

    out: Strides
    inplace: bool
    numbers: bool
    strides: Strides
    source_mask: Strides | None


def cdiv(length: int, block: int) -> int:
    """Number of blocks that cover `length`."""
    return -(-length // block)


def reference_step(pairing: Pairing) -> int:
    """Distance between the first reference items of neighbouring source items."""
    return pairing.references if pairing.per_item else 0


def programs(config: tuning.Config, tasks: int, device: torch.device) -> int:
    """Number of programs that share `tasks` tiles; few when interpreted, so that they do share."""
    multiprocessors = 3 if runtime.interpreting() else runtime.multiprocessors(device.index)
    return min(tasks, multiprocessors * config.CTAS_PER_SM)


def plan_of(x: Tensor, M: int, pairing: Pairing) -> tuning.Plan:
    """The tuning table's current plan for x (B, N, D) and references of M tokens."""
    arch = tuning.INTERPRETED if runtime.interpreting() else runtime.architecture(x.device.index)
    sources = pairing.items - pairing.groups if pairing.mode == "first" else pairing.items
    _, N, D = x.shape
    return tuning.plan(arch, runtime.DTYPES[x.dtype], sources * pairing.slots, N, M, D)


def coarse_serves(mode: str, channels: int) -> bool:
    """Return True if kind "coarse" can serve a call when the tuning table asks for it.

    It does not take "others": kind "pairs" computes half of the products, so int8 at twice the rate
    gains nothing.
    """
    return mode != "others" and channels <= MOST_COARSE_CHANNELS


class Geometry:
    """Sizes, plan and launches of one kind of call.

    Args:
        call: one of the calls; only shapes, strides and settings are kept.
        push: layout of what the calls push; None if they only match.
        plan: the tuning table's plan.
    """

    def __init__(self, call: Call, push: Push | None, plan: tuning.Plan) -> None:
        pairing, mask = call.pairing, call.reference_mask
        self.x, self.reference = x, reference = Tokens.of(call.x), Tokens.of(call.reference)
        self.official, self.total = call.matching == "official", call.combine == "sum"
        self.mask = None if mask is None else mask.stride()
        self.pairing, self.push, self.plan = pairing, push, plan
        self.device, self.dtype = call.x.device, call.x.dtype
        self.interpreted = runtime.interpreting()
        self.reference_scales = reference.shape[0], self.scale_room(reference.shape[1])
        self.source_scales = x.shape[0], self.scale_room(x.shape[1])
        self.items, self.N, self.D = x.shape
        self.M, self.slots, self.mode = reference.shape[1], pairing.slots, pairing.mode
        self.group_size = pairing.group_size
        self.products = len(pairing.sources) * pairing.slots
        self.pairs = self.mode == "others"
        # Official matching and the sum of all pushes need the match of each slot separately.
        self.by_slot = push is None or self.official or self.total
        # A key of the union of all slots has 31 bits for slot and token.
        self.by_fused = not self.by_slot and (plan.kind == "fused" or self.slots * self.M >= 2**31)
        self.coarse = plan.kind == "coarse" and coarse_serves(self.mode, self.D)
        step = reference_step(pairing)
        self._sizes = (self.N, self.M, self.D, self.slots, self.group_size, step)

    @property
    def result_slots(self) -> int:
        """S of the results (B, S, N)."""
        return self.slots if self.push is None or self.total else 1

    @property
    def config(self) -> tuning.Config:
        """The configuration of the tiles."""
        return self.plan.pairs if self.pairs else self.plan.tiles

    @functools.cached_property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """First item and number of items of each part that is matched and then pushed.

        There are two parts if the plan overlaps: the first is pushed while the last is matched. The
        last is just large enough to hide the other's push, since nothing hides its own.
        """
        overlap = self.plan.kind == "tiles" and self.plan.tiles.OVERLAP
        if self.by_slot or self.pairs or not overlap or self.items < 2:
            return ((0, self.items),)
        last = math.ceil(self.items * PUSH_BY_MATCHING / (PUSH_BY_MATCHING + self.M))
        first = max(self.items - last, 1)
        return (0, first), (first, self.items - first)

    # -----------------------------------------------------------------------------------------
    # Launches
    # -----------------------------------------------------------------------------------------
    @staticmethod
    def scale_room(tokens: int) -> int:
        """Number of scales of an item of `tokens` tokens, in whole blocks."""
        return cdiv(tokens, tuning.SCALE_BLOCK) * tuning.SCALE_BLOCK

    def _scale(self, tokens: Tokens, mask: Strides | None, item_step: int, keys: int) -> Launch:
        from ..kernels.match import scale_kernel

        (items, length, _), config = tokens.shape, self.plan.scale
        return Launch(
            scale_kernel,
            (cdiv(self.scale_room(length), config.BLOCK_M), cdiv(items, item_step)),
            (length, self.D, item_step, keys, *tokens.strides, *(mask or (0, 0))),
            (config.BLOCK_M, config.BLOCK_K),
            config.options(),
        )

    @functools.cached_property
    def scale(self) -> Launch:
        """Scales of the references; the launch also empties the keys."""
        keys = 0
        if not self.by_fused:
            keys = self.items * (self.slots if self.by_slot else 1) * self.N
        step = self.group_size if self.mode == "first" else 1
        return self._scale(self.reference, self.mask, step, keys)

    @functools.cached_property
    def source_scale(self) -> Launch:
        """Scales of the source tokens, which official matching searches."""
        return self._scale(self.x, None, 1, 0)

    @functools.cached_property
    def tiles(self) -> tuple[Launch | None, ...]:
        """Matching by tiles: a launch for each part; None for a part without products."""
        if self.pairs:
            return (self._tiles(0, self.products // 2),)
        found, before = [], 0
        for first, items in self.parts:
            sources = sum(first <= item < first + items for item in self.pairing.sources)
            found.append(self._tiles(before, sources * self.slots))
            before += sources * self.slots
        return tuple(found)

    @functools.cached_property
    def templates(self) -> tuple[Any, Any]:
        """Descriptors of rows and columns without their tokens; (None, None) if there are none."""
        config = self.config
        rows, columns = (self.reference, self.x) if self.official else (self.x, self.reference)
        if not config.DESCRIPTORS:
            return None, None
        row, column = (
            template(side.shape, side.strides, self.dtype, block, config.BLOCK_K)
            for side, block in ((rows, config.BLOCK_M), (columns, config.BLOCK_N))
        )
        return (None, None) if row is None or column is None else (row, column)

    def _tiles(self, first_product: int, products: int) -> Launch | None:
        from ..kernels.division import reciprocal
        from ..kernels.match import tiled_match_kernel

        config = self.config
        row_blocks = cdiv(self.N, config.BLOCK_M)
        column_blocks = cdiv(self.M, config.BLOCK_N)
        tasks = products * row_blocks * column_blocks
        if tasks == 0:
            return None
        if self.pairs:
            divisor = self.group_size * (self.group_size - 1) // 2
        else:
            divisor = self.group_size - 1 if self.mode == "first" else self.slots
        rows, columns = (self.reference, self.x) if self.official else (self.x, self.reference)
        return Launch(
            tiled_match_kernel,
            (programs(config, tasks, self.device), 1),
            (
                *self._sizes[:4],
                *(first_product, products),
                *self._sizes[4:],
                reciprocal(row_blocks * column_blocks),
                reciprocal(config.GROUP_M * column_blocks),
                reciprocal(row_blocks % config.GROUP_M or 1),
                reciprocal(divisor),
                reciprocal(self.group_size),
                *rows.strides,
                *columns.strides,
            ),
            (
                *(self.mode, self.official, self.pairs, not self.by_slot, self.interpreted),
                *(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.GROUP_M),
                bool(config.FLATTEN),
            ),
            config.options(cap=not (self.interpreted or torch.version.hip)),
        )

    @functools.cached_property
    def resolve(self) -> Launch:
        """Similarity and index of every slot, from its keys."""
        from ..kernels.match import resolve_kernel

        config = self.plan.resolve
        return Launch(
            resolve_kernel,
            (cdiv(self.N, config.BLOCK_M), self.items),
            (*self._sizes, *self.x.strides, *self.reference.strides),
            (self.mode, self.official, config.BLOCK_M, config.BLOCK_K),
            config.options(),
        )

    def _pushing(
        self,
        kernel: Any,
        config: tuning.Config,
        items: int,
        number: tuple[int, ...] = (),
        constant: tuple[bool, ...] = (),
        columns: tuple[int, ...] = (),
    ) -> Launch:
        """A launch that pushes; the last three arguments are parameters of this kernel alone."""
        assert self.push is not None
        push = self.push
        strides = (*self.x.strides, *self.reference.strides, *push.out, *push.strides)
        return Launch(
            kernel,
            (cdiv(self.N, config.BLOCK_M), items),
            (*self._sizes, *number, *strides, *(push.source_mask or (0, 0))),
            (
                *(self.mode, push.numbers, *constant, push.inplace, self.interpreted),
                *(config.BLOCK_M, *columns, config.BLOCK_K),
            ),
            config.options(),
        )

    @functools.cached_property
    def fused(self) -> Launch:
        """Match and push in one launch: every program owns some rows."""
        from ..kernels.fused import fused_kernel

        config = self.plan.fused
        return self._pushing(fused_kernel, config, self.items, columns=(config.BLOCK_N,))

    @functools.cached_property
    def push_from_keys(self) -> tuple[Launch, ...]:
        """The push after tiles: a launch for each part."""
        from ..kernels.push import push_from_keys_kernel

        return tuple(
            self._pushing(push_from_keys_kernel, self.plan.push_from_keys, items, number=(first,))
            for first, items in self.parts
        )

    @functools.cached_property
    def from_matches(self) -> Launch:
        """The push from the matches of all slots."""
        from ..kernels.push import push_kernel

        return self._pushing(push_kernel, self.plan.push, self.items, constant=(self.total,))


_known: dict[tuple[Any, ...], Geometry] = {}
#: Largest number of geometries that are kept; all are forgotten when there are more.
MOST = 1024


def geometry(call: Call, push: Push | None = None) -> Geometry:
    """Return the `Geometry` of a call, which pushes as `push` says, or only matches."""
    x, reference, mask = call.x, call.reference, call.reference_mask
    shape, other = x.shape, reference.shape
    key = (
        *(shape, x.stride(), other, reference.stride(), x.dtype, x.device),
        *(None if mask is None else mask.stride(), call.pairing),
        *(call.matching, call.combine, push),
    )
    # Ask for the plan every time: the table may have changed.
    plan = plan_of(x, other[1], call.pairing)
    known = _known.get(key)
    if known is None or known.plan != plan:
        if len(_known) >= MOST:
            _known.clear()
        known = _known[key] = Geometry(call, push, plan)
    return known
