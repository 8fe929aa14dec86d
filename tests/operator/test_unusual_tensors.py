"""Tensors whose memory says something else than their values: right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import negtome_fast as nf
from helpers.cases import lazily_negated, tokens
from helpers.device import BACKENDS, DEVICE
from negtome_fast.functional import guide_tokens
from negtome_fast.nudging import nudge

REFERENCE = tokens(torch.Generator().manual_seed(1), (2, 20, 16)).to(DEVICE)
ALPHA = torch.tensor([0.9, -0.4], device=DEVICE)
THRESHOLD = torch.tensor([0.3, 0.5], device=DEVICE)


def sample() -> Tensor:
    return tokens(torch.Generator().manual_seed(0), (3, 20, 16)).to(DEVICE)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "first": {},
    "others, sum": {"reference": "others", "combine": "sum", "alpha": ALPHA},
    "official": {"matching": "official"},
    "references": {"reference": REFERENCE, "alpha": ALPHA, "threshold": THRESHOLD},
}


def negated(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: lazily_negated(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_lazily_negated_views_are_their_values(name: str, backend: str) -> None:
    x, arguments = sample(), ARGUMENTS[name]
    expected = guide_tokens(x, **arguments, backend=backend)
    for source, others in ((lazily_negated(x), arguments), (x, negated(arguments))):
        result = guide_tokens(source, **others, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    view = lazily_negated(x)
    assert nf.negtome(view, **negated(arguments), backend=backend, inplace=True) is view
    assert torch.equal(view, expected[0]) and view.is_neg()


@pytest.mark.parametrize("backend", BACKENDS)
def test_real_and_imaginary_parts_of_conjugates_are_matched(backend: str) -> None:
    z = torch.complex(sample(), REFERENCE[:1] - sample()).conj()
    for part in (z.real, z.imag):
        dense = part.clone()
        found = nf.match_tokens(part, REFERENCE, backend=backend)
        expected = nf.match_tokens(dense, REFERENCE, backend=backend)
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[0], expected[0])
        layer = nf.NegToMe(backend=backend)
        torch.testing.assert_close(layer(part), layer(dense))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_callers_take_negated_views_in_place(backend: str) -> None:
    torch._dynamo.reset()

    def block(t: Tensor) -> Tensor:
        return nf.negtome(t, REFERENCE, inplace=True, backend=backend) * 1.0

    x, view = sample(), lazily_negated(sample())
    expected = nf.negtome(x, REFERENCE, backend=backend)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(view), expected) and torch.equal(view, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nudging_takes_negated_views(backend: str) -> None:
    latents, desired, undesired = sample(), REFERENCE, REFERENCE.flip(0) * 0.5
    weight = torch.tensor([0.2, 0.4, 0.1], device=DEVICE)
    expected = nudge(latents, desired, undesired, alpha=weight, backend=backend)
    given = (lazily_negated(t) for t in (latents, desired, undesired))
    result = nudge(*given, alpha=lazily_negated(weight), backend=backend)
    assert torch.equal(result.latents, expected.latents)


def refused(kind: type[Exception], match: str, change: Callable[..., Any], where: str) -> Any:
    return pytest.param(kind, match, change, where, id=f"{where}: {match}")


@pytest.mark.parametrize(
    ("kind", "match", "change", "where"),
    [
        *(
            refused(
                TypeError, f"{name} must be dense, got torch.sparse_coo", Tensor.to_sparse, name
            )
            for name in ("x", "reference", "reference_mask", "source_mask", "alpha", "threshold")
        ),
        refused(TypeError, "x must be dense, got torch.sparse_csr", Tensor.to_sparse_csr, "x"),
        refused(TypeError, "x is a nested tensor", lambda x: torch.nested.nested_tensor([*x]), "x"),
        refused(
            TypeError,
            "x is a nested tensor",
            lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged),
            "x",
        ),
        refused(
            TypeError,
            "reference is a nested tensor",
            lambda r: torch.nested.nested_tensor([*r]),
            "reference",
        ),
        refused(
            TypeError,
            "got torch.qint8",
            lambda x: torch.quantize_per_tensor(x.cpu(), 0.1, 0, torch.qint8),
            "x",
        ),
        refused(TypeError, "got torch.complex64", lambda x: torch.complex(x, x).conj(), "x"),
        refused(TypeError, "alpha is on meta, without a value", lambda a: a.to("meta"), "alpha"),
    ],
)
def test_layouts_that_are_no_array_are_refused(
    kind: type[Exception], match: str, change: Callable[..., Any], where: str
) -> None:
    given = {
        "x": sample(),
        "reference": REFERENCE,
        "reference_mask": torch.ones(2, 20, dtype=torch.bool, device=DEVICE),
        "source_mask": torch.ones(3, 20, dtype=torch.bool, device=DEVICE),
        "alpha": ALPHA,
        "threshold": THRESHOLD,
    }
    given[where] = change(given[where])
    with pytest.raises(kind, match=match):
        nf.negtome(**given)
    if where == "x":
        with pytest.raises(kind, match=match):
            nf.negtome(given["x"])
        with pytest.raises(kind, match=match):
            nf.match_tokens(given["x"])


@pytest.mark.parametrize("where", ["latents", "desired", "alpha"])
def test_nudging_refuses_sparse_tensors(where: str) -> None:
    given = {"latents": sample(), "desired": REFERENCE, "alpha": torch.ones(3, device=DEVICE)}
    given[where] = given[where].to_sparse()
    with pytest.raises(TypeError, match=f"{where} must be dense, got torch.sparse_coo"):
        nudge(**given)


@pytest.mark.parametrize("strides", [(160, 8, 1), (320, 16, 0), (0, 16, 1), (320, 8, 2)])
def test_tokens_that_share_memory_are_not_written(strides: tuple[int, ...]) -> None:
    x = torch.randn(2000, device=DEVICE).as_strided((3, 20, 16), strides)
    before = x.clone()
    with pytest.raises(ValueError, match="needs memory for every token"):
        nf.negtome(x, inplace=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize("strides", [(1, 3, 60), (3, 2, 1000), (320, 16, 1), (16, 100, 1)])
def test_tokens_in_any_order_of_memory_are_written(strides: tuple[int, ...]) -> None:
    """Also where the strides alone do not say that no two places are one, as 3 and 2 of (3, 2)."""
    shape = (2, 3, 16) if strides == (3, 2, 1000) else (3, 20, 16)
    memory = torch.randn(20000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = memory.as_strided(shape, strides)
    expected = nf.negtome(x.clone(), threshold=0.0)
    assert torch.equal(nf.negtome(x, threshold=0.0, inplace=True), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_computes_each_part(backend: str) -> None:
    x, twice = sample(), torch.stack([sample(), sample() * 2 + 1])
    each = torch.vmap(lambda t: nf.negtome(t, REFERENCE, backend=backend))(twice)
    assert torch.equal(each[1], nf.negtome(twice[1], REFERENCE, backend=backend))
    by_alpha = torch.vmap(lambda a: nf.negtome(x, alpha=a, backend=backend))(ALPHA)
    assert torch.equal(by_alpha[1], nf.negtome(x, alpha=-0.4, backend=backend))
    with pytest.raises(RuntimeError, match="does not work under"):
        torch.vmap(lambda t: nf.negtome(t, inplace=True, backend=backend))(twice)


def dual(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x, x))


@pytest.mark.parametrize(
    ("transform", "match"),
    [
        (lambda f, x: torch.func.jvp(f, (x,), (x,)), "no forward-mode derivative"),
        (dual, "no forward-mode derivative"),
        (lambda f, x: torch.func.grad(lambda t: f(t).sum())(x), "under torch.func"),
        (lambda f, x: torch.func.vjp(f, x), "under torch.func"),
    ],
    ids=["jvp", "dual", "grad", "vjp"],
)
@pytest.mark.parametrize("argument", ["x", "reference"])
def test_derivatives_that_do_not_exist_are_refused(
    argument: str, transform: Callable[..., Any], match: str
) -> None:
    """Forward mode would return a derivative of zero without a word."""
    x = sample()
    if argument == "x":
        with pytest.raises(RuntimeError, match=match):
            transform(nf.negtome, x)
    else:
        with pytest.raises(RuntimeError, match=match):
            transform(lambda r: nf.negtome(x, r), REFERENCE)


def test_transforms_of_other_arguments_are_served() -> None:
    x, one = sample(), torch.ones((), device=DEVICE)
    y = nf.negtome(x)
    gradient = torch.func.grad(lambda a: (nf.negtome(x) * a).sum())(one)
    torch.testing.assert_close(gradient, y.sum())
    value, tangent = torch.func.jvp(lambda a: nf.negtome(x) * a, (one,), (one,))
    assert torch.equal(value, y) and torch.equal(tangent, y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16), (0, 0, 16)])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"matching": "official"}, {"inplace": True}, {"reference": REFERENCE}],
    ids=str,
)
def test_empty_batches_come_back(
    arguments: dict[str, Any], shape: tuple[int, ...], backend: str
) -> None:
    x = torch.empty(shape, device=DEVICE)
    y, similarity, pushed = guide_tokens(x, **arguments, backend=backend)
    assert y.shape == shape and similarity.shape == pushed.shape == (shape[0], 1, shape[1])
