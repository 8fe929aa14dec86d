"""The launches of a call, as its shapes, strides and choices settle them.

A `Geometry` is worked out once and kept, since a model calls the operator with the same few shapes
in every block and step. It holds no tensors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import tuning
from ..kernels.pairing import Pairing
from . import triton_runtime as runtime
from .triton_launch import Launch

#: Where a mask's items and tokens lie, or None without a mask.
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
    """How a call pushes: where the output and the mask of what may move lie.

    numbers: alpha and threshold are numbers of the host; else `strides` are theirs over the slots.
    """

    out: Strides
    inplace: bool
    numbers: bool
    strides: Strides
    movable: Strides | None


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


class Geometry:
    """Sizes, plan and launches of one kind of call.

    Args:
        x, reference: where the tokens lie.
        pairing: which source item meets which reference item.
        mask: strides of the mask of reference tokens, or None.
        official: official matching.
        total: the sum of all slots' pushes.
        push: None where the call only matches.
        device: index of the device; None when interpreted.
        plan: of the tuning table.
    """

    def __init__(
        self,
        x: Tokens,
        reference: Tokens,
        pairing: Pairing,
        mask: Strides | None,
        official: bool,
        total: bool,
        push: Push | None,
        device: int | None,
        plan: tuning.Plan,
    ) -> None:
        self.x, self.reference, self.pairing, self.mask = x, reference, pairing, mask
        self.official, self.total, self.push, self.plan = official, total, push, plan
        self.device, self.interpreted = device, runtime.interpreting()
        self.items, self.N, self.D = x.shape
        self.M, self.slots, self.mode = reference.shape[1], pairing.slots, pairing.mode
        self.group_size, self.groups = pairing.group_size, pairing.groups
        self.products = len(pairing.sources) * pairing.slots
        self.pairs = self.mode == "others"
        # Matches of every slot by itself, for a push that takes them all or another way round.
        self.by_slot = push is None or official or total
        # A key of the union of all slots has 31 bits for slot and token.
        self.by_rows = not self.by_slot and (plan.kind == "rows" or self.slots * self.M >= 2**31)
        # How many reference items further the next source item's first one is.
        step = pairing.references if pairing.per_item else 0
        self._sizes = (self.N, self.M, self.D, self.slots, self.group_size, step)

    @property
    def result_slots(self) -> int:
        """S of the results (B, S, N)."""
        return self.slots if self.push is None or self.total else 1

    @property
    def config(self) -> tuning.Config:
        """The configuration of the tiles."""
        return self.plan.pairs if self.pairs else self.plan.tiles

    @property
    def overlaps(self) -> bool:
        """Whether items are matched one after another, and each is pushed beside the next."""
        return not self.pairs and bool(self.plan.tiles.OVERLAP) and self.items > 1

    # -----------------------------------------------------------------------------------------
    # Launches
    # -----------------------------------------------------------------------------------------
    @staticmethod
    def scale_room(tokens: int) -> int:
        """Scales of an item of `tokens` tokens, in whole blocks."""
        return _blocks(tokens, tuning.SCALE_BLOCK) * tuning.SCALE_BLOCK

    def _scale(self, tokens: Tokens, mask: Strides | None, item_step: int, keys: int) -> Launch:
        from ..kernels.match import scale_kernel

        (items, length, _), config = tokens.shape, self.plan.scale
        return Launch(
            scale_kernel,
            (_blocks(self.scale_room(length), config.BLOCK_M), _blocks(items, item_step)),
            (length, self.D, item_step, keys, *tokens.strides, *(mask or (0, 0))),
            (config.BLOCK_M, config.BLOCK_K),
            config.options(),
        )

    @functools.cached_property
    def scale(self) -> Launch:
        """Scales of the references; the launch also empties the keys."""
        keys = 0
        if not self.by_rows:
            keys = self.items * (self.slots if self.by_slot else 1) * self.N
        step = self.group_size if self.mode == "first" else 1
        return self._scale(self.reference, self.mask, step, keys)

    @functools.cached_property
    def source_scale(self) -> Launch:
        """Scales of the source tokens, which official matching searches."""
        return self._scale(self.x, None, 1, 0)

    @functools.cached_property
    def tiles(self) -> tuple[Launch | None, ...]:
        """Matching by tiles: one launch; or one for each item where the plan overlaps.

        None for what has no products, such as the head of a group.
        """
        if not self.overlaps or self.by_slot:
            return (self._tiles(0, self.products // 2 if self.pairs else self.products),)
        found, first = [], 0
        for item in range(self.items):
            head = self.mode == "first" and item % self.group_size == 0
            count = 0 if head else self.slots
            found.append(self._tiles(first, count))
            first += count
        return tuple(found)

    def _tiles(self, first_product: int, products: int) -> Launch | None:
        from ..kernels.division import reciprocal
        from ..kernels.match import tile_kernel

        config = self.config
        row_blocks = _blocks(self.N, config.BLOCK_M)
        column_blocks = _blocks(self.M, config.BLOCK_N)
        tasks = products * row_blocks * column_blocks
        if tasks == 0:
            return None
        if self.pairs:
            divisor = self.group_size * (self.group_size - 1) // 2
        else:
            divisor = self.group_size - 1 if self.mode == "first" else self.slots
        rows, columns = (self.reference, self.x) if self.official else (self.x, self.reference)
        return Launch(
            tile_kernel,
            (self._programs(tasks), 1),
            (
                *self._sizes[:4],
                *(first_product, products),
                *self._sizes[4:],
                reciprocal(row_blocks * column_blocks),
                reciprocal(config.GROUP * column_blocks),
                reciprocal(row_blocks % config.GROUP or 1),
                reciprocal(divisor),
                reciprocal(self.group_size),
                *rows.strides,
                *columns.strides,
            ),
            (
                *(self.mode, self.official, self.pairs, not self.by_slot, self.interpreted),
                *(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.GROUP),
                bool(config.FLATTEN),
            ),
            config.options(cap=not (self.interpreted or torch.version.hip)),
        )

    def _programs(self, tasks: int) -> int:
        """How many programs share `tasks` tiles; few when interpreted, so that they do share."""
        multiprocessors = 3
        if not self.interpreted:
            multiprocessors = runtime.multiprocessors(self.device or 0)
        return min(tasks, multiprocessors * self.config.RESIDENT)

    @functools.cached_property
    def resolve(self) -> Launch:
        """From keys to similarity and index of every slot."""
        from ..kernels.match import resolve_kernel

        config = self.plan.resolve
        return Launch(
            resolve_kernel,
            (_blocks(self.N, config.BLOCK_M), self.items),
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
        """A launch that pushes; the last three are parameters that the kernel alone has."""
        assert self.push is not None
        push = self.push
        strides = (*self.x.strides, *self.reference.strides, *push.out, *push.strides)
        return Launch(
            kernel,
            (_blocks(self.N, config.BLOCK_M), items),
            (*self._sizes, *number, *strides, *(push.movable or (0, 0))),
            (
                *(self.mode, push.numbers, *constant, push.inplace, self.interpreted),
                *(config.BLOCK_M, *columns, config.BLOCK_K),
            ),
            config.options(),
        )

    @functools.cached_property
    def rows(self) -> Launch:
        """Match and push in one launch, in which programs own rows."""
        from ..kernels.rows import rows_kernel

        config = self.plan.rows
        return self._pushing(rows_kernel, config, self.items, columns=(config.BLOCK_N,))

    @functools.cached_property
    def finish(self) -> tuple[Launch, ...]:
        """The push after tiles: one launch, or one for each item where the plan overlaps."""
        from ..kernels.push import finish_kernel

        parts = [(item, 1) for item in range(self.items)] if self.overlaps else [(0, self.items)]
        return tuple(
            self._pushing(finish_kernel, self.plan.finish, items, number=(first,))
            for first, items in parts
        )

    @functools.cached_property
    def from_matches(self) -> Launch:
        """The push from what every slot found."""
        from ..kernels.push import push_kernel

        return self._pushing(push_kernel, self.plan.push, self.items, constant=(self.total,))


_known: dict[tuple[Any, ...], Geometry] = {}
#: Kinds of calls that are kept; all are forgotten when there are more.
MOST = 1024


def geometry(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    mask: Tensor | None,
    official: bool = False,
    total: bool = False,
    push: Push | None = None,
) -> Geometry:
    """The geometry of a call; arguments as for `Geometry`, but tensors."""
    device = x.device.index
    arch = tuning.INTERPRETED if runtime.interpreting() else runtime.architecture(device)
    mask_strides = None if mask is None else mask.stride()
    shape, other = x.shape, reference.shape
    key = (
        *(shape, x.stride(), other, reference.stride(), x.dtype, device, mask_strides),
        *(pairing, official, total, push),
    )
    sources = pairing.items - pairing.groups if pairing.mode == "first" else pairing.items
    products = sources * pairing.slots
    # Asked every time: a table may have changed.
    plan = tuning.plan(arch, runtime.DTYPES[x.dtype], products, shape[1], other[1], shape[2])
    known = _known.get(key)
    if known is None or known.plan != plan:
        if len(_known) >= MOST:
            _known.clear()
        given = Tokens.of(x), Tokens.of(reference), pairing, mask_strides
        known = Geometry(*given, official, total, push, device, plan)
        _known[key] = known
    return known
