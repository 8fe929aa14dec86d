"""Fixtures of all tests; `helpers.device` chooses the device before a kernel is imported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import helpers.device  # noqa: F401
from bench.gpu import poison


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every freshly allocated output starts as NaN, so that a value never written shows."""
    with poison.poisoned():
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
