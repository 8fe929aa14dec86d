"""Division by multiplication with a reciprocal, as tiled_match_kernel divides tile numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

import torch
import triton
import triton.language as tl

from helpers.device import DEVICE
from negtome_fast.kernels.division import quotient, reciprocal

MOST = 2**31 - 1


def divide(number: int, divisor: int) -> int:
    """`quotient` with Python integers."""
    code = reciprocal(divisor)
    return (number * (code >> 6)) >> (code & 63)


@given(st.integers(0, MOST), st.integers(1, MOST))
def test_quotients_are_exact(number: int, divisor: int) -> None:
    assert divide(number, divisor) == number // divisor


@given(st.integers(1, MOST), st.integers(0, MOST), st.integers(-1, 1))
def test_quotients_are_exact_beside_multiples(divisor: int, factor: int, by: int) -> None:
    number = min(max(factor % (MOST // divisor + 1) * divisor + by, 0), MOST)
    assert divide(number, divisor) == number // divisor


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 2**30, 2**30 + 1, MOST - 1, MOST])
def test_factors_fit_32_bits_and_products_64(divisor: int) -> None:
    code = reciprocal(divisor)
    assert code >> 6 < 2**32 and 31 <= code & 63 < 64
    for number in (0, 1, divisor - 1, divisor, MOST - 1, MOST):
        assert divide(number, divisor) == number // divisor


@pytest.mark.parametrize("divisor", [0, -1, 2**31])
def test_other_divisors_are_refused(divisor: int) -> None:
    with pytest.raises(ValueError, match=str(divisor)):
        reciprocal(divisor)


@triton.jit
def _divide_kernel(number_ptr, out_ptr, code, count, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    number = tl.load(number_ptr + place, mask=place < count, other=0)
    tl.store(out_ptr + place, quotient(number, code), mask=place < count)


@pytest.mark.parametrize("divisor", [1, 2, 3, 640, 65537, 2**30 + 1, MOST])
def test_the_kernel_divides_alike(divisor: int) -> None:
    numbers = [0, 1, 2, divisor - 1, divisor, MOST // divisor * divisor, MOST - 1, MOST]
    number = torch.tensor(numbers, dtype=torch.int32, device=DEVICE)
    out = torch.full_like(number, -1)
    _divide_kernel[(1,)](number, out, reciprocal(divisor), len(numbers), BLOCK=8)
    assert out.tolist() == [value // divisor for value in numbers]
