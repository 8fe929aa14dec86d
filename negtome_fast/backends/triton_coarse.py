"""Kind "coarse" of the Triton backend: int8 products with bounds, then exact scores of the rest.

kernels/coarse.py says what is computed and why no best token is lost. Memory, for D channels
rounded up to whole steps: a reference token takes D + 20 bytes, half of its size in bf16. A source
token takes D + 16 bytes, and 8 bytes for each block of columns that it meets; as many as fit into
SCRATCH_BYTES are taken at a time. The values of a reference item take 388 MB for 75,600 tokens of
5,120 channels.

Nothing waits for the device: what is in question is counted, listed and processed there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call
from ..kernels import tuning
from ..pairing import Pairing
from . import triton_runtime as runtime
from .triton_descriptors import descriptors
from .triton_geometry import cdiv, geometry, programs, reference_step

#: Largest memory for the source tokens that are taken at a time; at least one block of rows of all
#: items is taken, whatever it needs.
SCRATCH_BYTES = 2**28
#: The values of a token begin at multiples of this, and steps over them need no masks.
STEP = 128
#: Bound on the relative error of a term of an fp32 sum in any order, with margin for the centre's
#: norm and for the rounding of the bound itself.
TERM_ERROR = 2.0**-24 * 1.02


# ---------------------------------------------------------------------------------------------
# Memory layout
# ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CoarseLayout:
    """Sizes of a call: S source items, Q reference items that are rounded, C centres."""

    pairing: Pairing
    tokens: int
    references: int
    columns: int
    channels: int
    bound: tuning.Config
    score: tuning.Config

    @property
    def width(self) -> int:
        """Number of bytes of a rounded token."""
        step = max(STEP, self.bound.BLOCK_K)
        return cdiv(self.channels, step) * step

    @property
    def sources(self) -> int:
        return len(self.pairing.sources)

    @property
    def item_step(self) -> int:
        """Distance between reference items that are met; with "first" they head their groups."""
        return self.pairing.group_size if self.pairing.mode == "first" else 1

    @property
    def rounded(self) -> int:
        return cdiv(self.references, self.item_step)

    @property
    def centre_steps(self) -> tuple[int, int]:
        """Number of source items, and number of reference items, that share a centre.

        Items of a group, or of a set of references, resemble each other more than others do.
        """
        if self.pairing.mode != "external":
            return self.pairing.group_size, self.pairing.group_size
        own = self.pairing.per_item
        return 1 if own else max(self.pairing.items, 1), self.pairing.references

    @property
    def column_blocks(self) -> int:
        return cdiv(self.columns, self.bound.BLOCK_N)

    @property
    def lists(self) -> int:
        """Number of blocks of columns of all products."""
        return self.sources * self.pairing.slots * self.column_blocks

    @property
    def rows(self) -> int:
        """Number of tokens of each source item that are taken at a time."""
        each = self.sources * (self.width + 16) + self.lists * 8
        block = self.bound.BLOCK_M
        most = max(SCRATCH_BYTES // each // block, 1) * block
        parts = cdiv(self.tokens, most)
        return min(cdiv(cdiv(self.tokens, parts), block) * block, self.tokens)

    def tiles(self, rows: int) -> int:
        """Largest number of tasks of a list of `rows` rows."""
        return cdiv(rows, self.score.BLOCK_M)


class Int8Tokens(NamedTuple):
    """Rounded tokens: values (Q, K, width) int8 and stats (., Q, K) fp32, see round_kernel."""

    values: Tensor
    stats: Tensor


class SourcePart(NamedTuple):
    """Source tokens `first` to `first + K - 1` of S items, and what is in question for them.

    bias (Q, M), blocks (2, Q, column blocks), upper and listed (lists, K), lower (S, K), counts
    (lists + 1,), tasks (lists, tiles): see the kernels.
    """

    first: int
    rounded: Int8Tokens
    bias: Tensor
    blocks: Tensor
    upper: Tensor
    lower: Tensor
    counts: Tensor
    listed: Tensor
    tasks: Tensor


class _PartScratch:
    """Memory of one part, which the next part uses again."""

    def __init__(self, layout: CoarseLayout, device: torch.device) -> None:
        rows, sources, lists = layout.rows, layout.sources, layout.lists
        sizes: dict[str, tuple[int, torch.dtype]] = {
            "values": (sources * rows * layout.width, torch.int8),
            "stats": (3 * sources * rows, torch.float32),
            "bias": (layout.rounded * layout.columns, torch.float32),
            "blocks": (2 * layout.rounded * layout.column_blocks, torch.float32),
            "upper": (lists * rows, torch.float32),
            "lower": (sources * rows, torch.int32),
            "counts": (lists + 1, torch.int32),
            "listed": (lists * rows, torch.int32),
            "tasks": (lists * layout.tiles(rows), torch.int32),
        }
        self._whole = {
            name: torch.empty(size, dtype=dtype, device=device)
            for name, (size, dtype) in sizes.items()
        }

    def part(self, layout: CoarseLayout, first: int) -> SourcePart:
        rows = min(layout.rows, layout.tokens - first)
        sources, lists = layout.sources, layout.lists

        def view(name: str, *shape: int) -> Tensor:
            size = 1
            for length in shape:
                size *= length
            return self._whole[name][:size].view(shape)

        return SourcePart(
            first,
            Int8Tokens(
                view("values", sources, rows, layout.width), view("stats", 3, sources, rows)
            ),
            view("bias", layout.rounded, layout.columns),
            view("blocks", 2, layout.rounded, layout.column_blocks),
            view("upper", lists, rows),
            view("lower", sources, rows),
            view("counts", lists + 1),
            view("listed", lists, rows),
            view("tasks", lists, layout.tiles(rows)),
        )


def coarse_layout(call: Call, plan: tuning.Plan) -> CoarseLayout:
    (_, tokens, channels), (references, columns, _) = call.x.shape, call.reference.shape
    score = plan.score
    if score.BLOCK_N > plan.bound.BLOCK_N:
        score = score._replace(BLOCK_N=plan.bound.BLOCK_N)
    return CoarseLayout(
        call.pairing,
        tokens=tokens,
        references=references,
        columns=columns,
        channels=channels,
        bound=plan.bound,
        score=score,
    )


# ---------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------
def _power_of_two(length: int) -> int:
    return 1 << (length - 1).bit_length()


def column_scales(call: Call) -> Tensor:
    """Compute the column scales of the references that `raise_keys` takes."""
    x, reference, mask = call.x, call.reference, call.reference_mask
    shape = geometry(call)
    scale = x.new_empty((len(reference), shape.scale_room(shape.M)), dtype=torch.float32)
    keys = x.new_empty((len(x), shape.slots, shape.N), dtype=torch.int64)
    shape.scale(False, reference, None if mask is None else mask.view(torch.uint8), scale, keys)
    return scale


def _centres(reference: Tensor, scale: Tensor, layout: CoarseLayout, plan: tuning.Plan) -> Tensor:
    """Compute the centres (C, D) fp32."""
    from ..kernels.coarse import centre_kernel

    each = layout.centre_steps[1]
    count = layout.references // each
    D = layout.channels
    centre = torch.empty((count, D), dtype=torch.float32, device=reference.device)
    centre_kernel[(cdiv(D, plan.centre.BLOCK_K), count)](
        reference,
        scale,
        centre,
        layout.columns,
        D,
        each,
        1 if layout.pairing.mode == "first" else each,
        *reference.stride(),
        **plan.centre.meta("BLOCK_M", "BLOCK_K"),
    )
    return centre


def _round(
    tokens: Tensor,
    centre: Tensor,
    into: Int8Tokens,
    layout: CoarseLayout,
    plan: tuning.Plan,
    scale: Tensor | None = None,
    part: SourcePart | None = None,
) -> None:
    """Round reference tokens, whose `scale` is known, or the source tokens of a part."""
    from ..kernels.coarse import round_kernel

    lines, count = into.values.shape[:2]
    config = plan.round
    round_kernel[(cdiv(count, config.BLOCK_M), lines)](
        tokens,
        scale,
        centre,
        into.values,
        into.stats,
        None if part is None else part.lower,
        None if part is None else part.counts,
        0 if part is None else part.first,
        count,
        tokens.shape[1],
        layout.channels,
        layout.width,
        layout.item_step,
        layout.centre_steps[part is None],
        layout.pairing.group_size,
        0 if part is None else part.counts.numel(),
        *tokens.stride(),
        MODE=layout.pairing.mode,
        BLOCK_M=config.BLOCK_M,
        BLOCK_D=_power_of_two(layout.width),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _bound(part: SourcePart, columns: Int8Tokens, layout: CoarseLayout, plan: tuning.Plan) -> None:
    """Fill in `upper` and `lower` of a part."""
    from ..kernels.coarse import bias_kernel, bound_kernel

    config, pairing, rows = layout.bound, layout.pairing, part.rounded
    count = rows.values.shape[1]
    bias_kernel[(layout.column_blocks, layout.rounded)](
        rows.stats,
        columns.stats,
        part.bias,
        part.blocks,
        layout.sources * count,
        layout.columns,
        layout.channels * TERM_ERROR,
        layout.rounded,
        BLOCK_N=config.BLOCK_N,
        **plan.bias.meta("BLOCK_K"),
    )
    products = layout.sources * pairing.slots
    tasks = products * layout.column_blocks * cdiv(count, config.BLOCK_M)
    bound_kernel[(programs(config, tasks, rows.values.device),)](
        rows.values,
        columns.values,
        *descriptors(rows.values, columns.values, config),
        rows.stats,
        columns.stats,
        part.bias,
        part.blocks,
        part.upper,
        part.lower,
        count,
        layout.columns,
        layout.width,
        pairing.slots,
        products,
        pairing.group_size,
        reference_step(pairing),
        layout.item_step,
        layout.sources,
        layout.rounded,
        MODE=pairing.mode,
        INTERPRETED=runtime.interpreting(),
        **config.meta("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M"),
        **({} if runtime.interpreting() or torch.version.hip else config.cap()),
    )


def _select(part: SourcePart, layout: CoarseLayout, plan: tuning.Plan) -> None:
    """For every block of columns, list the rows whose best column it may hold."""
    from ..kernels.coarse_scores import select_kernel

    config, count = plan.select, part.lower.shape[1]
    block = min(config.BLOCK_M, layout.score.BLOCK_M)
    select_kernel[(cdiv(count, block), layout.sources)](
        part.upper,
        part.lower,
        part.counts,
        part.listed,
        part.tasks,
        count,
        layout.lists,
        layout.lists // layout.sources,
        layout.tiles(count),
        BLOCK_M=block,
        TILE=layout.score.BLOCK_M,
        **config.meta("BLOCK_N"),
    )


def _score(call: Call, scale: Tensor, keys: Tensor, part: SourcePart, layout: CoarseLayout) -> None:
    """Raise `keys` to the best candidates of the listed rows and blocks of columns."""
    from ..kernels.coarse_scores import score_kernel

    x, reference = call.x, call.reference
    config, pairing, count = layout.score, layout.pairing, part.lower.shape[1]
    split = layout.bound.BLOCK_N // config.BLOCK_N
    score_kernel[(programs(config, part.tasks.numel() * split, x.device),)](
        x,
        reference,
        scale,
        keys,
        part.counts,
        part.listed,
        part.tasks,
        part.first,
        count,
        layout.tokens,
        layout.columns,
        layout.channels,
        pairing.slots,
        layout.lists,
        layout.tiles(count),
        layout.column_blocks,
        pairing.group_size,
        reference_step(pairing),
        *x.stride(),
        *reference.stride(),
        MODE=pairing.mode,
        INTERPRETED=runtime.interpreting(),
        SPLIT=split,
        **config.meta("BLOCK_M", "BLOCK_N", "BLOCK_K"),
        **({} if runtime.interpreting() or torch.version.hip else config.cap()),
    )


def source_parts(
    call: Call, scale: Tensor, layout: CoarseLayout, plan: tuning.Plan
) -> Iterator[tuple[SourcePart, Int8Tokens]]:
    """Yield all source tokens part by part, after listing what is in question for them."""
    x, reference = call.x, call.reference
    shape = layout.rounded, layout.columns
    columns = Int8Tokens(
        torch.empty((*shape, layout.width), dtype=torch.int8, device=x.device),
        torch.empty((4, *shape), dtype=torch.float32, device=x.device),
    )
    centre = _centres(reference, scale, layout, plan)
    _round(reference, centre, columns, layout, plan, scale=scale)
    scratch = _PartScratch(layout, x.device)
    for first in range(0, layout.tokens, layout.rows):
        part = scratch.part(layout, first)
        _round(x, centre, part.rounded, layout, plan, part=part)
        _bound(part, columns, layout, plan)
        _select(part, layout, plan)
        yield part, columns


def raise_keys(call: Call, scale: Tensor, keys: Tensor, plan: tuning.Plan) -> None:
    """Raise `keys` to the best candidates.

    Args:
        call: tokens in fp32, bf16 or fp16, of at most MOST_COARSE_CHANNELS channels; any mode.
        scale: (P, M up to whole blocks) fp32, the column scales of `reference`.
        keys: (B, 1, N) int64, emptied; tokens are slot * M + token.
        plan: configurations of the kernels in `tuning.COARSE`.
    """
    layout = coarse_layout(call, plan)
    if layout.lists == 0 or layout.tokens == 0:
        return
    for part, _ in source_parts(call, scale, layout, plan):
        _score(call, scale, keys, part, layout)
