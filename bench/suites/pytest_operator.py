"""pytest-benchmark entries: `make bench`, or `python -m pytest bench/suites/pytest_operator.py`.

They have small shapes, and compare versions of the code on one machine over time; `python -m bench`
compares with other code.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.compared.candidates import CANDIDATES
from bench.compared.shapes import Shape, random_tokens
from bench.timing.correctness import check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SHAPES = (Shape("1024 tokens", 4, 1024, 640), Shape("two groups", 8, 1024, 1280, groups=2))
NAMES = ("ours", "authors", "matmul")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_time(benchmark: Any, shape: Shape, name: str) -> None:
    x = random_tokens(shape, DTYPE, DEVICE)
    check(shape, x)
    function = CANDIDATES[name].prepare(shape, x)

    def call() -> None:
        function(x)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(shape)
    benchmark.pedantic(call, warmup_rounds=2, rounds=10)
