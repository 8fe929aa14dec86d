"""Fixtures of the tests of integrations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All operators exported, with assembly, in one process that compiles."""
    # Imports Triton, which other tests here do not need.
    from helpers.exported import OPERATORS
    from negtome_fast.integrations import export

    root = tmp_path_factory.mktemp("exported")
    result = {name: root / str(number) for number, name in enumerate(OPERATORS)}
    written = export.export_all([(OPERATORS[n], result[n]) for n in OPERATORS], assembly=True)
    for paths, folder in zip(written, result.values(), strict=True):
        assert sorted(paths) == sorted(folder.iterdir())
    return result
