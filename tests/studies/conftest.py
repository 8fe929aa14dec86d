"""Fixtures of the tests of studies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A face of the model's world in a wide frame, and the mask of its upper half."""
    from negtome_fast.models.avatars import CHARACTERS, render

    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.fromarray(render(CHARACTERS["captain red"][0])).resize((80, 40)).save(path)
    mask = Image.new("L", (40, 40))
    mask.paste(255, (0, 0, 40, 20))
    mask.save(path.with_name("top.png"))
    return path
