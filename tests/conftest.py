"""Fixtures of all tests; `helpers.device` chooses the device before a kernel is imported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import helpers.device  # noqa: F401
from bench.gpu import poison


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every freshly allocated output starts as NaN, so that a value never written shows."""
    with poison.poisoned():
        yield
