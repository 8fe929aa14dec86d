"""The contestants: the operator and what it is compared with, each as a function of `x` alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import baselines
from .shapes import Shape

Call = Callable[[Tensor], Tensor]
OURS = "ours"
#: Rows of scores among which the split version takes the fastest; at most this many bytes of them.
SPLIT_ROWS = (512, 2048, 8192)
SPLIT_BYTES = 2**30
#: `torch.compile` unrolls the split version's loop.
MOST_CHUNKS = 32


@dataclass(frozen=True)
class Candidate:
    """`prepare(shape, example)` gives the function to measure.

    `returns_result` is False where the output is a stored similarity matrix: overhead, which the
    operator is there to avoid, and not the result. `compiles` marks functions whose first call
    at a shape compiles. `exact` ones promise the operator's own result, and are held to it.
    """

    label: str
    prepare: Callable[[Shape, Tensor], Call]
    returns_result: bool = True
    compiles: bool = False
    exact: bool = False


def _ours(shape: Shape, example: Tensor) -> Call:
    from negtome_fast.functional import negtome

    # As tensors, they are converted and checked once and not in every call.
    alpha = torch.tensor(baselines.ALPHA, device=example.device)
    threshold = torch.tensor(baselines.THRESHOLD, device=example.device)
    return lambda x: negtome(x, alpha=alpha, threshold=threshold, groups=shape.groups)


def _authors(shape: Shape, example: Tensor) -> Call:
    return lambda x: baselines.authors(x, shape.groups)


def _compile(function: Callable[..., Tensor], example: Tensor) -> Callable[..., Tensor]:
    # CUDA graphs are left out of the mode because the timing captures one around it anyway.
    mode = "max-autotune-no-cudagraphs" if example.is_cuda else "default"
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)


def _authors_compiled(shape: Shape, example: Tensor) -> Call:
    compiled = _compile(baselines.authors, example)
    return lambda x: compiled(x, shape.groups)


def fastest(calls: Sequence[Call], x: Tensor, clock: Callable[[], float]) -> Call:
    """The call that takes the least time on `x`, each warmed up by one call."""
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
    """How many rows of scores the split version may store at a time: a few choices to try."""
    total = (shape.items // shape.groups - 1) * shape.tokens
    fitting = max(1, SPLIT_BYTES // (4 * shape.tokens))
    fewest = -(-total // MOST_CHUNKS)
    return sorted({min(max(rows, fewest), fitting, total) for rows in SPLIT_ROWS})


def _split_by(function: Callable[..., Tensor], shape: Shape, rows: int) -> Call:
    return lambda x: function(x, shape.groups, rows=rows)


def _split(shape: Shape, example: Tensor) -> Call:
    calls = [_split_by(baselines.split, shape, rows) for rows in split_rows(shape)]
    return fastest(calls, example, _clock(example)) if len(calls) > 1 else calls[0]


def _split_compiled(shape: Shape, example: Tensor) -> Call:
    # Of the sizes the middle one: each more would cost the compiler's time again.
    rows = split_rows(shape)
    return _split_by(_compile(baselines.split, example), shape, rows[len(rows) // 2])


def _matmul(shape: Shape, example: Tensor) -> Call:
    return lambda x: baselines.matmul(x, shape.groups)


def _matmul_into(shape: Shape, example: Tensor) -> Call:
    rows = (shape.items // shape.groups - 1) * shape.tokens
    out = torch.zeros(shape.groups, rows, shape.tokens, dtype=example.dtype, device=example.device)
    return lambda x: baselines.matmul_into(x, out, shape.groups)


CANDIDATES = {
    OURS: Candidate("ours", _ours, exact=True),
    "authors": Candidate("authors' function", _authors),
    "authors-compiled": Candidate("authors', torch.compile", _authors_compiled, compiles=True),
    "split": Candidate("split, library matmul", _split, exact=True),
    "split-compiled": Candidate("split, torch.compile", _split_compiled, compiles=True, exact=True),
    "matmul": Candidate("bare matmul", _matmul, returns_result=False),
    "matmul-into": Candidate("bare matmul, no allocation", _matmul_into, returns_result=False),
}
