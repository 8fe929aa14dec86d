"""The layer: defaults, buffers, and the same results as the function."""

from __future__ import annotations

import copy

import pytest
import torch

import negtome_fast as nf
from helpers.cases import tokens

X = tokens(torch.Generator().manual_seed(0), (3, 30, 16))


def test_layer_equals_function() -> None:
    layer = nf.NegToMe(alpha=0.4, threshold=0.2, reference="others", combine="sum")
    expected = nf.negtome(X, "others", alpha=0.4, threshold=0.2, combine="sum")
    assert torch.equal(layer(X), expected)
    reference = torch.randn(7, 16)
    assert torch.equal(
        layer(X, reference), nf.negtome(X, reference, alpha=0.4, threshold=0.2, combine="sum")
    )


def test_layer_has_no_parameters_and_no_state() -> None:
    layer = nf.NegToMe()
    assert not list(layer.parameters()) and not layer.state_dict()


def test_half_does_not_round_alpha() -> None:
    layer = nf.NegToMe(alpha=0.9).half()
    assert layer.alpha.dtype == torch.float32
    assert float(layer.alpha) == float(torch.tensor(0.9))
    assert layer(X.half()).dtype == torch.float16


def test_buffers_do_not_follow_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = nf.NegToMe(alpha=0.9)
        y = nf.negtome(X, dropout=0.5, generator=torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.alpha.dtype == torch.float32 and float(layer.alpha) == float(torch.tensor(0.9))
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(y, nf.negtome(X, dropout=0.5, generator=generator))


def test_assigning_numbers_changes_the_result_and_is_checked() -> None:
    layer = nf.NegToMe()
    layer.alpha = 0.0
    assert torch.equal(layer(X), X)
    with pytest.raises(ValueError, match="alpha must be finite"):
        layer.alpha = float("nan")
    with pytest.raises(TypeError, match="threshold must be a number"):
        layer.threshold = "high"
    with pytest.raises(ValueError, match="alpha must be finite"):
        nf.NegToMe(alpha=float("inf"))


def test_layer_copies_and_prints() -> None:
    layer = copy.deepcopy(nf.NegToMe(alpha=0.25))
    assert "alpha=0.25" in repr(layer)
    assert torch.equal(layer(X), nf.negtome(X, alpha=0.25))
