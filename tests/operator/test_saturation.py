"""Finite tokens stay finite: a push beyond the range of a dtype ends at its largest number.

The table of cases has such pushes for every backend and kernel; here are the paths and the promises
that it leaves out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import negtome_fast as nf
from helpers.cases import CASES, Case, altered, plain, tokens
from helpers.device import BACKENDS, DEVICE
from helpers.oracle import Problem, bits
from negtome_fast.backends import small
from negtome_fast.functional import guide_tokens
from negtome_fast.naive import Saturated

SATURATED = [case for case in CASES if case.name.endswith("saturated")]
LARGEST = 65504.0


def two_items(dtype: torch.dtype = torch.float16) -> Tensor:
    """A reference token and a source token that lie apart, and would leave fp16."""
    x = torch.tensor([[[1000.0, 1000.0]], [[60000.0, -30000.0]]])
    return x.to(DEVICE, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.9, 3.0])
def test_smallest_case_ends_at_the_largest_number(alpha: float, backend: str) -> None:
    x = two_items()
    y = nf.negtome(x, alpha=alpha, threshold=0.0, backend=backend)
    low = max(-30000 + alpha * -31000, -LARGEST)
    assert y[0].tolist() == x[0].tolist()
    assert y[1].tolist() == [[LARGEST, torch.tensor(low).half().item()]]


@pytest.mark.parametrize("case", SATURATED, ids=str)
def test_large_calls_of_the_torch_backend_saturate(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "SMALL", 0)
    x, arguments = case.make(DEVICE)
    result = guide_tokens(x, **arguments, backend="torch")
    Problem(x, arguments).check_guide(*result)
    assert nf.negtome(x, **arguments, backend="torch", inplace=True) is x
    assert torch.equal(bits(x), bits(result[0]))


@pytest.mark.parametrize("case", SATURATED, ids=str)
def test_cases_do_leave_the_range(case: Case) -> None:
    x, arguments = case.make()
    y = nf.negtome(x, **arguments, backend="reference")
    assert bool(x.isfinite().all())
    assert (y.abs() == torch.finfo(x.dtype).max).float().mean() > 0.05


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("combine", ["nearest", "sum"])
def test_double_precision_saturates_as_well(combine: str, backend: str) -> None:
    x = 1e140 * tokens(torch.Generator().manual_seed(0), (3, 20, 8), torch.float64).to(DEVICE)
    y = nf.negtome(x, "others", combine=combine, alpha=1e250, backend=backend)
    assert bool(y.isfinite().all()) and bool((y.abs() == torch.finfo(y.dtype).max).any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_pushes_of_both_signs_beyond_the_range_are_no_nan(backend: str) -> None:
    x = 1e15 * tokens(torch.Generator().manual_seed(0), (3, 20, 8)).to(DEVICE)
    alpha = torch.tensor([1e38, -1e38], device=DEVICE)
    y = nf.negtome(x, x[:2].clone(), combine="sum", alpha=alpha, threshold=0.0, backend=backend)
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_tokens_that_are_not_finite_come_back_among_those_that_saturate(
    value: float, backend: str
) -> None:
    def change(x: Tensor) -> Tensor:
        x = (2e4 * x.float()).clamp(-LARGEST, LARGEST).half()
        x[1, 3, 2] = x[0, 5, 0] = x[2, 7] = value
        return x

    x, arguments = Case("infinite", altered(plain((3, 20, 8), torch.float16), change)).make(DEVICE)
    y, similarity, pushed = guide_tokens(x, **arguments, backend=backend)
    Problem(x, arguments).check_guide(y, similarity, pushed)
    assert torch.equal(bits(y[1, 3]), bits(x[1, 3])) and torch.equal(bits(y[2, 7]), bits(x[2, 7]))
    assert not bool((pushed == 5).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_beyond_fp32_leaves_a_finite_token_alone(dtype: torch.dtype, backend: str) -> None:
    x = tokens(torch.Generator().manual_seed(0), (3, 20, 8), dtype).to(DEVICE)
    x[1, 4] = 1e30  # its square is beyond fp32, though the token is not
    x[0, 5] = -2e19
    y, similarity, pushed = guide_tokens(x, threshold=-1.0, backend=backend)
    assert torch.equal(y[1, 4], x[1, 4]) and similarity[1, 0, 4] == float("-inf")
    assert not bool((pushed == 5).any()) and bool((pushed[1:] >= 0).sum() == 2 * 20 - 1)
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_passes_through_saturation_and_is_not_clamped_itself(backend: str) -> None:
    x = two_items().requires_grad_()
    y = nf.negtome(x, alpha=1.0, threshold=0.0, backend=backend)
    assert y[1, 0, 0] == LARGEST
    seed = torch.tensor([[[1.0, 1.0]], [[2.0, 40000.0]]], dtype=torch.float16, device=DEVICE)
    (gradient,) = torch.autograd.grad(y, x, seed)
    # (1 + alpha) g, and g - alpha g in item 0. A loss scaler has to see that 80,000 overflows.
    assert gradient.tolist() == [[[-1.0, -40000.0]], [[4.0, float("inf")]]]


def test_saturation_in_plain_torch_has_the_same_gradient() -> None:
    values = torch.tensor([1.0, 1e6, -1e6, float("nan")], requires_grad=True)
    rounded = Saturated.apply(values, torch.float16)
    assert torch.equal(bits(rounded), bits(values.clamp(-LARGEST, LARGEST).half()))
    seed = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (gradient,) = torch.autograd.grad(rounded, values, seed.half())
    assert gradient.dtype == torch.float32 and torch.equal(gradient, seed)


def test_a_compiled_caller_saturates() -> None:
    torch._dynamo.reset()
    layer: Any = nf.NegToMe(alpha=3.0, threshold=0.0)
    x = two_items()
    compiled = torch.compile(lambda t: layer(t * 1.0), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), nf.negtome(x, alpha=3.0, threshold=0.0))
    assert bool(compiled(x).isfinite().all())
