"""The operator and its rivals by name, each as a function of the tokens alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import baselines, rivals
from .shapes import Shape

Call = Callable[[Tensor], Any]
"""Function of the tokens; bare products may return several matrices."""
OURS = "ours"
SPLIT_ROWS = (512, 2048, 8192)
"""Rows of scores among which the split version takes the fastest."""
SPLIT_BYTES = 2**30
"""Maximum bytes of scores."""
MOST_CHUNKS = 32
"""Maximum number of chunks of rows; `torch.compile` unrolls the loop over them."""


@dataclass(frozen=True)
class Candidate:
    """A function to measure.

    Attributes:
        label: name in tables.
        prepare: (shape, example) -> the function.
        returns_result: False if the output is a stored similarity matrix, which the operator avoids
            and which therefore counts as extra memory.
        compiles: the first call at a shape compiles.
        exact: the result must be the operator's, and is checked.
        others: serves shapes in which all items of a group meet each other.
    """

    label: str
    prepare: Callable[[Shape, Tensor], Call]
    returns_result: bool = True
    compiles: bool = False
    exact: bool = False
    others: bool = False


def _ours(shape: Shape, example: Tensor) -> Call:
    from negtome_fast.functional import negtome

    # Tensors are converted and checked once and not in every call.
    alpha = torch.tensor(baselines.ALPHA, device=example.device)
    threshold = torch.tensor(baselines.THRESHOLD, device=example.device)
    reference: Literal["first", "others"] = "others" if shape.others else "first"
    return lambda x: negtome(x, reference, alpha=alpha, threshold=threshold, groups=shape.groups)


def _authors(shape: Shape, example: Tensor) -> Call:
    return lambda x: baselines.authors(x, shape.groups)


def _compile(function: Callable[..., Tensor], example: Tensor) -> Callable[..., Tensor]:
    # This mode uses no CUDA graphs, because the timing captures a graph anyway.
    mode = "max-autotune-no-cudagraphs" if example.is_cuda else "default"
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)


def _authors_compiled(shape: Shape, example: Tensor) -> Call:
    compiled = _compile(baselines.authors, example)
    return lambda x: compiled(x, shape.groups)


def fastest(calls: Sequence[Call], x: Tensor, clock: Callable[[], float]) -> Call:
    """The call that takes the least time on `x`, after one call to warm up."""
    taken = []
    for call in calls:
        call(x)
        start = clock()
        call(x)
        taken.append(clock() - start)
    return calls[taken.index(min(taken))]


def _clock(example: Tensor) -> Callable[[], float]:
    def read() -> float:
        if example.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    return read


def split_rows(shape: Shape) -> list[int]:
    """Numbers of rows of scores that the split version may store at a time."""
    size = shape.items // shape.groups
    total = shape.tokens if shape.others else (size - 1) * shape.tokens
    columns = (size - 1) * shape.tokens if shape.others else shape.tokens
    fitting = max(1, SPLIT_BYTES // (4 * columns))
    fewest = -(-total // MOST_CHUNKS)
    return sorted({min(max(rows, fewest), fitting, total) for rows in SPLIT_ROWS})


def _split_by(function: Callable[..., Tensor], shape: Shape, rows: int) -> Call:
    return lambda x: function(x, shape.groups, rows=rows)


def _split(shape: Shape, example: Tensor) -> Call:
    function = baselines.split_others if shape.others else baselines.split
    calls = [_split_by(function, shape, rows) for rows in split_rows(shape)]
    return fastest(calls, example, _clock(example)) if len(calls) > 1 else calls[0]


def _split_compiled(shape: Shape, example: Tensor) -> Call:
    # Each further size would cost the compiler's time again, so the middle one must do.
    rows = split_rows(shape)
    return _split_by(_compile(baselines.split, example), shape, rows[len(rows) // 2])


def _matmul(shape: Shape, example: Tensor) -> Call:
    if shape.others:
        return lambda x: baselines.matmul_others(x, shape.groups)
    return lambda x: baselines.matmul(x, shape.groups)


def _matmul_into(shape: Shape, example: Tensor) -> Call:
    rows = (shape.items // shape.groups - 1) * shape.tokens
    out = torch.zeros(shape.groups, rows, shape.tokens, dtype=example.dtype, device=example.device)
    return lambda x: baselines.matmul_into(x, out, shape.groups)


def _by_assignment(package: str, whole: bool) -> Callable[[Shape, Tensor], Call]:
    """The operator, or the matching alone, by the fused assignment of a k-means package."""

    def prepare(shape: Shape, example: Tensor) -> Call:
        assign = rivals.assignment(package)
        function = rivals.negtome_by if whole else rivals.assigned
        return lambda x: function(assign, x, shape.groups)

    return prepare


CANDIDATES = {
    OURS: Candidate("ours", _ours, exact=True, others=True),
    "authors": Candidate("authors' function", _authors),
    "authors-compiled": Candidate("authors', torch.compile", _authors_compiled, compiles=True),
    "split": Candidate("split, library matmul", _split, exact=True, others=True),
    "split-compiled": Candidate("split, torch.compile", _split_compiled, compiles=True, exact=True),
    "matmul": Candidate("bare matmul", _matmul, returns_result=False, others=True),
    "matmul-into": Candidate("bare matmul, no allocation", _matmul_into, returns_result=False),
    "flash-kmeans": Candidate("flash-kmeans + push", _by_assignment("flash-kmeans", True)),
    "flash-kmeans-match": Candidate(
        "flash-kmeans, match", _by_assignment("flash-kmeans", False), returns_result=False
    ),
    "flashlib": Candidate("flashlib + push", _by_assignment("flashlib", True)),
    "flashlib-match": Candidate(
        "flashlib, match", _by_assignment("flashlib", False), returns_result=False
    ),
}
OF_PACKAGES = ("flash-kmeans", "flash-kmeans-match", "flashlib", "flashlib-match")
"""Candidates that need a GPU and a package; they are measured only if asked for."""
