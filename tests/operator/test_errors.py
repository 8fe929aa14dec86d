"""Bad arguments are refused before any kernel runs, and the message says what was wrong."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import negtome_fast as nf
from negtome_fast import functional, ops

X = torch.randn(4, 10, 8)


def refused(kind: type[Exception], match: str, x: Any = X, **arguments: Any) -> Any:
    return pytest.param(kind, match, x, arguments, id=match)


@pytest.mark.parametrize(
    ("kind", "match", "x", "arguments"),
    [
        refused(ValueError, r"\(B, N, D\), got \(10, 8\)", X[0]),
        refused(TypeError, "x must be a tensor .* got list", [1.0]),
        refused(TypeError, "got torch.int64", X.long()),
        refused(ValueError, "no channels", X[..., :0]),
        refused(ValueError, "4 items does not divide into 3", groups=3),
        refused(ValueError, "groups must be a positive integer, got 0", groups=0),
        refused(ValueError, 'matching must be .* got "?.?best', matching="best"),
        refused(ValueError, "combine must be", combine="mean"),
        refused(ValueError, "reference must be .* got 'last'", reference="last"),
        refused(ValueError, "one each", reference="others", groups=4),
        refused(ValueError, "6 channels, x has 8", reference=torch.randn(5, 6)),
        refused(ValueError, r"\(M, D\), .* got \(8,\)", reference=torch.randn(8)),
        refused(TypeError, "reference is torch.float64", reference=torch.randn(5, 8).double()),
        refused(ValueError, "each of the 4 items", reference=torch.randn(3, 1, 5, 8)),
        refused(ValueError, "no references", reference=torch.randn(0, 5, 8)),
        refused(
            ValueError, "as many .* 5 and 10", reference=torch.randn(5, 8), matching="official"
        ),
        refused(TypeError, "must be a bool tensor", reference_mask=torch.ones(10)),
        refused(ValueError, r"\(10,\) .* got \(9,\)", reference_mask=torch.ones(9).bool()),
        refused(ValueError, "source_mask must have", source_mask=torch.ones(3, 10).bool()),
        refused(ValueError, "alpha must be finite in fp32, got nan", alpha=math.nan),
        refused(ValueError, "threshold must be finite in fp32, got inf", threshold=math.inf),
        refused(ValueError, r"in fp32, got nan$", alpha=torch.tensor(math.nan)),
        refused(TypeError, "alpha must be a number", alpha="0.9"),
        refused(TypeError, "floating-point", alpha=torch.tensor(1)),
        refused(
            ValueError,
            "one value for each of the 3 references",
            reference=torch.randn(3, 5, 8),
            alpha=torch.ones(2),
        ),
        refused(ValueError, r"fp32, got 1e\+300", alpha=1e300),
        refused(ValueError, r"fp32, got 1e\+300$", alpha=torch.tensor(1e300, dtype=torch.float64)),
        refused(TypeError, "got ndarray", reference=np.zeros((5, 8))),
        refused(ValueError, "probability", dropout=1.5),
        refused(ValueError, "probability .* '0.5'", dropout="0.5"),
        refused(TypeError, "torch.Generator, got int", generator=5),
        refused(ValueError, "expanded", X[:1].expand(3, 10, 8), inplace=True),
        refused(ValueError, "backend must be one of", backend="cuda"),
        refused(
            ValueError, "not differentiable", torch.randn(2, 3, 4, requires_grad=True), inplace=True
        ),
    ],
)
def test_bad_argument_is_refused(
    kind: type[Exception], match: str, x: Any, arguments: dict[str, Any]
) -> None:
    before = x.clone() if isinstance(x, torch.Tensor) else None
    with pytest.raises(kind, match=match):
        nf.negtome(x, **arguments)
    if before is not None:
        assert torch.equal(x, before)


def test_numpy_numbers_are_numbers() -> None:
    y = nf.negtome(X, alpha=np.float32(0.5), threshold=np.float64(0.1), groups=np.int64(2))
    assert torch.equal(y, nf.negtome(X, alpha=0.5, threshold=0.1, groups=2))


def test_reference_on_another_device_is_refused() -> None:
    with pytest.raises(TypeError, match="on meta"):
        nf.negtome(X, torch.empty(5, 8, device="meta"))
    with pytest.raises(TypeError, match="reference_mask is on meta"):
        nf.negtome(X, reference_mask=torch.empty(10, dtype=torch.bool, device="meta"))


def test_fp64_is_refused_by_triton_by_name() -> None:
    with pytest.raises(ValueError, match="backend='torch' for fp64"):
        nf.negtome(X.double(), backend="triton")


def test_triton_without_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from negtome_fast.backends import triton_runtime

    monkeypatch.setattr(triton_runtime, "available", lambda device: (False, "no GPU was found"))
    with pytest.raises(RuntimeError, match="no GPU was found"):
        nf.negtome(X, backend="triton")


def test_environment_decides_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEGTOME_FAST_BACKEND", "reference")
    assert ops.resolve_backend("auto", X.device, X.dtype) == "reference"
    assert ops.resolve_backend("torch", X.device, X.dtype) == "torch"
    monkeypatch.setenv("NEGTOME_FAST_BACKEND", "abacus")
    with pytest.raises(ValueError, match="abacus"):
        nf.negtome(X)


def test_nothing_to_push_warns_once_and_returns_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_warned", set())
    with pytest.warns(UserWarning, match="nothing to push"):
        y = nf.negtome(X, groups=4)
    assert torch.equal(y, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(nf.negtome(X[:1]), X[:1])


@pytest.mark.parametrize("shape", [(2, 0, 8), (0, 5, 8)])
def test_empty_inputs_come_back(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape)
    assert nf.negtome(x, torch.randn(3, 8)).shape == shape
    assert nf.match_tokens(x, torch.randn(3, 8))[1].shape == shape[:2]


def test_reference_without_tokens_leaves_everything() -> None:
    assert torch.equal(nf.negtome(X, torch.randn(0, 8)), X)
    assert torch.all(nf.match_tokens(X, torch.randn(0, 8))[1] == -1)
