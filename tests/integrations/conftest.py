"""Fixtures of the tests of integrations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def double() -> Iterator[None]:
    """Models and noise in fp64.

    The tokens of a small model lie so close together that fp32's rounding would sometimes choose
    another match.
    """
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
