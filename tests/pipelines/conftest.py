"""Pipelines that tests share; each test must leave them without hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


def _shared(name: str) -> Iterator[Any]:
    from helpers.pipelines_fixtures import built, hook_count  # needs diffusers

    yield built(name)
    assert hook_count(built(name)) == 0


@pytest.fixture(params=["flux", "sd15", "sdxl"])
def family(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each family; `built(family)` is its pipeline."""
    for _ in _shared(request.param):
        yield request.param


@pytest.fixture
def flux() -> Iterator[Any]:
    yield from _shared("flux")


@pytest.fixture
def sdxl() -> Iterator[Any]:
    yield from _shared("sdxl")
