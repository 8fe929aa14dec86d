"""The contestants: the operator and what it is compared with, each as a function of `x` alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import baselines
from .shapes import Shape

Call = Callable[[Tensor], Tensor]
OURS = "ours"


@dataclass(frozen=True)
class Candidate:
    """`prepare(shape, example)` gives the function to measure.

    `returns_result` is False where the output is a stored similarity matrix: overhead, which the
    operator is there to avoid, and not the result. `compiles` marks functions whose first call
    at a shape compiles.
    """

    label: str
    prepare: Callable[[Shape, Tensor], Call]
    returns_result: bool = True
    compiles: bool = False


def _ours(shape: Shape, example: Tensor) -> Call:
    from negtome_fast.functional import negtome

    # As tensors, they are converted and checked once and not in every call.
    alpha = torch.tensor(baselines.ALPHA, device=example.device)
    threshold = torch.tensor(baselines.THRESHOLD, device=example.device)
    return lambda x: negtome(x, alpha=alpha, threshold=threshold, groups=shape.groups)


def _authors(shape: Shape, example: Tensor) -> Call:
    return lambda x: baselines.authors(x, shape.groups)


def _authors_compiled(shape: Shape, example: Tensor) -> Call:
    # CUDA graphs are left out of the mode because the timing captures one around it anyway.
    mode = "max-autotune-no-cudagraphs" if example.is_cuda else "default"
    compiled = torch.compile(baselines.authors, mode=mode, dynamic=False, fullgraph=True)
    return lambda x: compiled(x, shape.groups)


def _matmul(shape: Shape, example: Tensor) -> Call:
    return lambda x: baselines.matmul(x, shape.groups)


def _matmul_into(shape: Shape, example: Tensor) -> Call:
    rows = (shape.items // shape.groups - 1) * shape.tokens
    out = torch.zeros(shape.groups, rows, shape.tokens, dtype=example.dtype, device=example.device)
    return lambda x: baselines.matmul_into(x, out, shape.groups)


CANDIDATES = {
    OURS: Candidate("ours", _ours),
    "authors": Candidate("authors' function", _authors),
    "authors-compiled": Candidate("authors', torch.compile", _authors_compiled, compiles=True),
    "matmul": Candidate("bare matmul", _matmul, returns_result=False),
    "matmul-into": Candidate("bare matmul, no allocation", _matmul_into, returns_result=False),
}
