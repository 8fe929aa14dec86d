"""The authors' function: their arguments, their results to fp32 rounding."""

from __future__ import annotations

import pytest
import torch

from helpers.cases import tokens
from helpers.compat_definition import authors_definition
from helpers.device import DEVICE
from negtome_fast.compat import negtome


@pytest.mark.parametrize("kind", ["none", "positions", "pairs", "float positions"])
def test_agrees_with_the_authors_definition(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = tokens(generator, (3, 60, 16)).to(DEVICE)
    mask = None
    if "positions" in kind:
        mask = (torch.rand(60, generator=generator) < 0.5).to(DEVICE).expand(180, 60)
        mask = mask.float() if "float" in kind else mask
    elif kind == "pairs":
        mask = (torch.rand(180, 60, generator=generator) < 0.5).to(DEVICE)
    y = negtome(x, alpha=0.9, threshold=0.65, mask=mask)
    expected = authors_definition(x, 0.9, 0.65, mask)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
    assert not torch.equal(y[1:], x[1:])


def test_defaults_are_the_authors() -> None:
    x = tokens(torch.Generator().manual_seed(0), (3, 60, 16)).to(DEVICE)
    expected = authors_definition(x, 0.5, 0.7, None)
    torch.testing.assert_close(negtome(x).double(), expected, rtol=0, atol=1e-5)


def test_dropout_draws_from_the_global_generator() -> None:
    x = tokens(torch.Generator().manual_seed(0), (3, 60, 16)).to(DEVICE)
    torch.manual_seed(5)
    first = negtome(x, threshold=-1.0, dropout=0.5)
    torch.manual_seed(5)
    kept = torch.rand(3, 60, device=DEVICE) > 0.5
    torch.manual_seed(5)
    assert torch.equal(first, negtome(x, threshold=-1.0, dropout=0.5))
    assert torch.equal((first != x).any(-1)[1:], kept[1:])


def test_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(120, 60\) or \(60, 60\), got \(60,\)"):
        negtome(torch.randn(2, 60, 8, device=DEVICE), mask=torch.ones(60, device=DEVICE))


@pytest.mark.parametrize("kind", ["none", "pairs"])
def test_large_tokens_of_fp16_stay_finite(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (2e4 * tokens(generator, (3, 60, 16))).clamp(-65504, 65504).half().to(DEVICE)
    mask = None
    if kind == "pairs":
        mask = (torch.rand(180, 60, generator=generator) < 0.5).to(DEVICE)
    y = negtome(x, alpha=0.9, threshold=0.3, mask=mask)
    expected = authors_definition(x, 0.9, 0.3, mask).clamp(-65504, 65504)
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=0)
    assert bool(y.isfinite().all()) and bool((y.abs() == 65504).any())


def test_token_that_is_not_finite_does_not_stop_the_others_of_its_frame() -> None:
    generator = torch.Generator().manual_seed(0)
    x = tokens(generator, (3, 40, 16)).to(DEVICE)
    mask = (torch.rand(3, 40, 40, generator=generator) < 0.5).to(DEVICE)
    without = mask.clone()
    without[1, 7] = False
    expected = negtome(x, threshold=0.3, mask=without.view(120, 40))
    x[1, 7, 2] = torch.nan
    y = negtome(x, threshold=0.3, mask=mask.view(120, 40))
    rest = torch.arange(40, device=DEVICE) != 7
    assert torch.equal(y[1, rest], expected[1, rest]) and torch.equal(y[2], expected[2])
    assert not torch.equal(y[1, rest], x[1, rest])
