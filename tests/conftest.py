"""Test-wide settings: without a GPU, Triton's kernels run under its interpreter on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton reads this when it decorates the kernels, so it must be set before they are imported.
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

BACKENDS = ["reference", "torch", *(["triton"] if find_spec("triton") else [])]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every freshly allocated output starts as NaN, so that a value never written shows."""
    new_empty, empty, empty_like = torch.Tensor.new_empty, torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(77) if tensor.dtype != torch.bool else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    yield
