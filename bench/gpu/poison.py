"""New memory that starts as NaN, so that a value that no kernel writes is seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SOURCES = ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like"))
"""Functions that return uninitialised tensors."""


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(77) if tensor.dtype != torch.bool else tensor


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every tensor that torch leaves uninitialised with NaN, or 77 for integers."""
    originals = [getattr(owner, name) for owner, name in _SOURCES]

    def poisoning(original: Any) -> Any:
        return lambda *arguments, **options: _poison(original(*arguments, **options))

    for (owner, name), original in zip(_SOURCES, originals, strict=True):
        setattr(owner, name, poisoning(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(_SOURCES, originals, strict=True):
            setattr(owner, name, original)
