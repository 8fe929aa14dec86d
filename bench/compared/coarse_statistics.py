"""Statistics of kind "coarse": how much its int8 bounds leave in question for given tokens.

A row's columns in question are those that may be its best one as far as the bounds tell; their
whole blocks are scored exactly. The time depends on their number, the result does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from negtome_fast.backends import triton_runtime as runtime
from negtome_fast.backends.triton_coarse import (
    TERM_ERROR,
    CoarseLayout,
    Int8Tokens,
    SourcePart,
    coarse_layout,
    column_scales,
    source_parts,
)
from negtome_fast.backends.triton_geometry import MOST_COARSE_CHANNELS, plan_of
from negtome_fast.call import Call
from negtome_fast.kernels import tuning
from negtome_fast.pairing import Pairing

#: A row counts as undecided if more than this share of its blocks is in question.
UNDECIDED = 0.25
#: kernels/coarse.py, SCORE_ERROR.
SCORE_ERROR = 2.0**-13


def coarse_statistics(
    x: Tensor,
    reference: Tensor | None = None,
    *,
    groups: int = 1,
    reference_mask: Tensor | None = None,
    sample: int = 256,
) -> dict[str, Any]:
    """Count what the int8 bounds leave in question for these tokens; waits for the device.

    Args:
        x: source tokens (B, N, D) fp32, bf16 or fp16.
        reference: external references (R, M, D); None takes item 0 of each group, like "first".
        groups: equal contiguous groups of items; 1 with external references.
        reference_mask: (P, M) bool, True where a token may be matched; P is R, or B without
            external references.
        sample: number of rows, spread evenly over all, whose columns are counted one by one.

    Returns:
        `rows` (source tokens that are finite), `columns` (that each of them meets) and
        `block_columns` (columns of a block); `blocks_mean`, `blocks_max`: blocks in question per
        row, each of which is scored exactly; `columns_mean`, `columns_max`: columns in question per
        row of the sample; `scored`: share of all exact scores that are computed; `undecided`: share
        of rows with more than a quarter of their blocks in question; `parts`: number of parts that
        the source tokens were cut into; `scratch_bytes`: memory of values, bounds and lists.

    Raises:
        ValueError: another dtype, more than MOST_COARSE_CHANNELS channels, or nothing to match.
        RuntimeError: Triton cannot run on the device of `x`.
    """
    runtime.require(x)
    if x.shape[2] > MOST_COARSE_CHANNELS:
        raise ValueError(
            f"x has {x.shape[2]} channels; at most {MOST_COARSE_CHANNELS} can be bounded"
        )
    if reference is None:
        pairing, tokens = Pairing("first", len(x), groups), x
    else:
        pairing, tokens = Pairing("external", len(x), references=len(reference)), reference
    if not pairing.sources or 0 in x.shape or 0 in tokens.shape:
        raise ValueError(
            f"nothing to match: x is {tuple(x.shape)}, references {tuple(tokens.shape)}"
        )
    with runtime.launch_device(x):
        plan = plan_of(x, tokens.shape[1], pairing)
        call = Call(x, tokens, pairing, reference_mask)
        layout = coarse_layout(call, plan)
        return _count(call, column_scales(call), layout, plan, sample)


def _count(
    call: Call, scale: Tensor, layout: CoarseLayout, plan: tuning.Plan, sample: int
) -> dict[str, Any]:
    blocks_a_row, columns_a_row = [], []
    tasks = held = parts = 0
    step = max(1, layout.sources * layout.tokens // sample)
    for part, columns in source_parts(call, scale, layout, plan):
        finite = part.rounded.stats[0] > 0
        in_question = in_question_of(part).view(layout.sources, -1, *part.lower.shape[1:])
        blocks_a_row.append(in_question.sum(dim=1)[finite])
        chosen = finite.nonzero()[::step]
        columns_a_row.append(columns_in_question(part, columns, layout, chosen))
        tasks += int(part.counts[-1])
        parts += 1
        # The first part is the largest.
        held = held or sum(one.nbytes for one in (*part.rounded, *columns, *part[2:]))
    blocks, singles = torch.cat(blocks_a_row).double(), torch.cat(columns_a_row).double()
    each = layout.pairing.slots * layout.column_blocks
    rows = len(blocks)
    scores = tasks * layout.score.BLOCK_M * layout.bound.BLOCK_N
    met = layout.pairing.slots * layout.columns
    return {
        "rows": rows,
        "columns": met,
        "block_columns": layout.bound.BLOCK_N,
        "blocks_mean": float(blocks.mean()) if rows else 0.0,
        "blocks_max": int(blocks.max()) if rows else 0,
        "columns_mean": float(singles.mean()) if len(singles) else 0.0,
        "columns_max": int(singles.max()) if len(singles) else 0,
        "scored": scores / (rows * met) if rows else 0.0,
        "undecided": float((blocks > UNDECIDED * each).double().mean()) if rows else 0.0,
        "parts": parts,
        "scratch_bytes": held,
    }


def lower_bounds(part: SourcePart) -> Tensor:
    """Lower bounds (S, K) fp32, from the integers of the same order; -inf without a candidate."""
    order = part.lower
    return torch.where(order < 0, order ^ 0x7FFFFFFF, order).view(torch.float32)


def in_question_of(part: SourcePart) -> Tensor:
    """(lists, K) bool, True for blocks of columns that may hold a row's best one."""
    lower = lower_bounds(part).repeat_interleave(len(part.upper) // len(part.lower), dim=0)
    return (part.upper >= lower) & (part.upper > -torch.inf)


def columns_in_question(
    part: SourcePart, columns: Int8Tokens, layout: CoarseLayout, chosen: Tensor, size: int = 4096
) -> Tensor:
    """Number of columns (K,) that may be best for each of `chosen` (K, 2) = (source, row)."""
    source, row = chosen.unbind(1)
    scale, length, error = (field[source, row].double() for field in part.rounded.stats)
    values = part.rounded.values[source, row].double()
    level = lower_bounds(part)[source, row].double()
    pairing = layout.pairing
    found = torch.zeros(len(chosen), dtype=torch.int64, device=chosen.device)
    owners = torch.tensor(pairing.sources, device=chosen.device)[source].tolist()
    for slot in range(pairing.slots):
        items = [pairing.reference_item(owner, slot) // layout.item_step for owner in owners]
        for item in set(items):
            mine = torch.tensor([one == item for one in items], device=chosen.device)
            for first in range(0, layout.columns, size):
                part_of = slice(first, first + size)
                stats = columns.stats[:, item, part_of].double()
                product = values[mine] @ columns.values[item, part_of].double().T
                upper = product * scale[mine, None] * stats[0] + stats[3]
                upper += length[mine, None] * stats[2] + error[mine, None] * stats[1]
                upper += layout.channels * TERM_ERROR * stats[1] + SCORE_ERROR
                found[mine] += ((upper >= level[mine, None]) & (upper > -torch.inf)).sum(dim=1)
    return found
