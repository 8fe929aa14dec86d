"""Gradients: the choice of match and the threshold are constants of the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import negtome_fast as nf
from helpers.cases import tokens
from helpers.device import DEVICE
from negtome_fast.functional import guide_tokens
from negtome_fast.pairing import Pairing

ARGUMENTS: dict[str, dict[str, Any]] = {
    "first": {},
    "first, groups": {"groups": 2},
    "others": {"reference": "others"},
    "others, sum": {"reference": "others", "combine": "sum", "alpha": 0.3},
    "official": {"matching": "official"},
    "dropout": {"dropout": 0.5},
}


def differentiable(
    x: torch.Tensor, reference: torch.Tensor, pushed: torch.Tensor, pairing: Pairing, alpha: float
) -> torch.Tensor:
    """Push with given matches, in plain torch, so that autograd knows the gradient."""
    y, length = x, reference.shape[1]
    item = torch.arange(len(x), device=x.device)[:, None]
    for row in range(pushed.shape[1]):
        at = pushed[:, row].clamp_min(0)
        r = reference[pairing.reference_item(item, at // length), at % length]
        y = y + torch.where((pushed[:, row] >= 0)[..., None], alpha * (x - r), 0.0)
    return y


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_in_batch_gradient_is_that_of_fixed_matches(name: str, dtype: torch.dtype) -> None:
    arguments = {**ARGUMENTS[name]}
    if "dropout" in arguments:
        arguments["generator"] = torch.Generator(DEVICE).manual_seed(3)
    x = tokens(torch.Generator().manual_seed(0), (4, 20, 6), dtype).to(DEVICE).requires_grad_()
    y, _, pushed = guide_tokens(x, **arguments)
    seed = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, seed)
    mode = arguments.get("reference", "first")
    pairing = Pairing(mode, 4, arguments.get("groups", 1))
    expected_y = differentiable(x, x, pushed, pairing, arguments.get("alpha", 0.9))
    (expected,) = torch.autograd.grad(expected_y, x, seed)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize("combine", ["nearest", "sum"])
def test_external_gradient_is_that_of_fixed_matches(per_item: bool, combine: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = tokens(generator, (3, 20, 6), torch.float64).to(DEVICE).requires_grad_()
    shape = (3, 2, 15, 6) if per_item else (2, 15, 6)
    reference = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)
    reference.requires_grad_()
    y, _, pushed = guide_tokens(x, reference, threshold=0.0, combine=combine)
    seed = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, reference), seed)
    pairing = Pairing("external", 3, references=2, per_item=per_item)
    flat = reference.flatten(0, 1) if per_item else reference
    expected_y = differentiable(x, flat, pushed, pairing, 0.9)
    expected = torch.autograd.grad(expected_y, (x, reference), seed)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_gradient_by_finite_differences() -> None:
    x = tokens(torch.Generator().manual_seed(0), (2, 6, 4), torch.float64).requires_grad_()
    r = tokens(torch.Generator().manual_seed(1), (2, 5, 4), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: nf.negtome(a, threshold=0.3), (x,))
    assert torch.autograd.gradcheck(lambda a, b: nf.negtome(a, b, threshold=0.3), (x, r))


def test_gradient_is_deterministic() -> None:
    x = tokens(torch.Generator().manual_seed(0), (4, 90, 16)).to(DEVICE).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        gradients = [torch.autograd.grad(nf.negtome(x, "others").sum(), x)[0] for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


def test_infinite_gradient_of_a_token_left_alone_stays_its_own() -> None:
    x = torch.eye(8, dtype=torch.float64)[None, :4].to(DEVICE).requires_grad_()
    r = torch.eye(8, dtype=torch.float64)[2:].to(DEVICE).requires_grad_()
    seed = torch.ones(1, 4, 8, dtype=torch.float64, device=DEVICE)
    seed[0, 0] = torch.inf  # token 0 matches nothing
    gradient_x, gradient_r = torch.autograd.grad(nf.negtome(x, r), (x, r), seed)
    assert bool(gradient_r.isfinite().all())
    assert bool(gradient_x[0, 1:].isfinite().all()) and bool(gradient_x[0, 0].isinf().all())


def test_half_precision_gradient_keeps_its_dtype() -> None:
    x = tokens(torch.Generator().manual_seed(0), (2, 9, 8), torch.bfloat16).to(DEVICE)
    x.requires_grad_()
    r = tokens(torch.Generator().manual_seed(1), (9, 8), torch.bfloat16).to(DEVICE).requires_grad_()
    nf.negtome(x, r).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert r.grad is not None and r.grad.dtype == torch.bfloat16 and r.grad.shape == r.shape
