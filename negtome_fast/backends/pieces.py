"""Searches for best columns, and pieces of tokens: shared by all parts of the torch backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-12
#: Columns are padded to whole runs: the maximum is found run by run, and a matrix library rounds
#: the columns at a ragged end in another way, which would decide between equal tokens.
RUN = 64
#: Elements of a piece of tokens that stays in a core's cache from one step to the next.
PIECE_ELEMENTS = 2**19


class Search(NamedTuple):
    """Rows `(N, D)` whose best columns are searched, and the results to fill in, `(N,)` each.

    Attributes:
        rows: the tokens.
        best, at: score of the best column, not divided by the norm of the row, and its index.
        norm: norm of the row.
    """

    rows: Tensor
    best: Tensor
    at: Tensor
    norm: Tensor


def padded(columns: int) -> int:
    """Number of columns in whole runs."""
    return -(-columns // RUN) * RUN


def piece_rows(channels: int) -> int:
    """Number of tokens of a piece."""
    return max(1, PIECE_ELEMENTS // channels)


def slices(count: int, size: int, start: int = 0) -> list[slice]:
    """Split the tokens from `start` to `count` into equal parts of at most `size`.

    They are equal because a part of few tokens takes nearly as long as a large one.
    """
    parts = -(-(count - start) // size)
    step = -(-(count - start) // max(parts, 1))
    return [slice(first, min(first + step, count)) for first in range(start, count, step or 1)]


def improve(best: Tensor, index: Tensor, value: Tensor, at: Tensor) -> None:
    """Update `best` and `index` to `value` and `at` where these are better; ties stay."""
    better = value > best
    index.copy_(torch.where(better, at, index))
    best.copy_(torch.where(better, value, best))
