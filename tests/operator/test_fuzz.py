"""Random and adversarial problems against the fp64 oracle of the fuzzer, on torch and Triton."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from helpers.device import DEVICE
from helpers.fuzz_run import check_seed

CHUNKS, EACH = 20, 500
#: The interpreter takes a hundred times as long.
KERNEL_CHUNKS, KERNELS_EACH = 8, 25


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_the_torch_backend_is_right(chunk: int) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for seed in range(chunk * EACH, (chunk + 1) * EACH):
            check_seed(seed)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(DEVICE != "cpu", reason="these problems are for the interpreter")
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("chunk", range(KERNEL_CHUNKS))
def test_the_interpreted_kernels_are_right(chunk: int) -> None:
    for seed in range(chunk * KERNELS_EACH, (chunk + 1) * KERNELS_EACH):
        check_seed(seed, triton=True)
