"""The operators under torch's compilers: opcheck, fake tensors, torch.compile, torch.export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import negtome_fast as nf
from helpers.cases import tokens
from helpers.device import BACKENDS, DEVICE
from negtome_fast import ops
from negtome_fast.backends import small
from negtome_fast.call import Call
from negtome_fast.pairing import Pairing


def sample(dtype: torch.dtype = torch.float32, items: int = 4) -> torch.Tensor:
    return tokens(torch.Generator().manual_seed(0), (items, 20, 16), dtype).to(DEVICE)


def arguments(backend: str, **changes: Any) -> tuple[Any, ...]:
    values = {
        "x": sample(),
        "reference": None,
        "alpha": torch.tensor(0.9, device=DEVICE),
        "threshold": torch.tensor(0.3, device=DEVICE),
        "reference_mask": None,
        "source_mask": None,
        "pairing_mode": "first",
        "groups": 1,
        "per_item": False,
        "matching": "paper",
        "combine": "nearest",
        "backend": backend,
    }
    return tuple({**values, **changes}.values())


VARIANTS: dict[str, dict[str, Any]] = {
    "first": {},
    "others, sum": {"pairing_mode": "others", "groups": 2, "combine": "sum"},
    "official": {"matching": "official"},
    "external": {
        "pairing_mode": "external",
        "reference": sample(items=2),
        "reference_mask": torch.ones(2, 20, dtype=torch.bool, device=DEVICE),
        "source_mask": torch.ones(4, 20, dtype=torch.bool, device=DEVICE),
    },
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_passes(variant: str, backend: str) -> None:
    values = arguments(backend, **VARIANTS[variant])
    opcheck(ops.guide, values)
    opcheck(ops.guide_, values)
    opcheck(ops.match, (*values[:2], values[4], *values[6:10], values[11]))


@pytest.mark.parametrize("variant", ["first", "external"])
def test_opcheck_passes_with_gradients(variant: str) -> None:
    values = list(arguments("torch", **VARIANTS[variant]))
    values[0] = values[0].clone().requires_grad_()
    if values[1] is not None:
        values[1] = values[1].clone().requires_grad_()
    opcheck(ops.guide, tuple(values))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_whole_and_agrees(dtype: torch.dtype, inplace: bool, backend: str) -> None:
    torch._dynamo.reset()

    def block(x: torch.Tensor) -> torch.Tensor:
        hidden = x * 2 + 1
        y = nf.negtome(hidden, alpha=0.5, threshold=0.3, inplace=inplace, backend=backend)
        return y.tanh()

    x = sample(dtype)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_with_inductor_and_takes_a_new_alpha(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    layer = nf.NegToMe(threshold=0.3).to(DEVICE)
    x = sample(dtype)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.compiler.set_stance("fail_on_recompile"):
        layer.alpha = 0.2
        torch.testing.assert_close(compiled(x), layer(x))


def test_new_alpha_and_threshold_do_not_recompile() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = nf.NegToMe(alpha=0.9, threshold=0.3).to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = sample()
    for alpha, threshold in ((0.9, 0.3), (0.2, 0.3), (-0.5, 0.1), (1.5, 0.9)):
        layer.alpha, layer.threshold = alpha, threshold
        expected = nf.negtome(x, alpha=alpha, threshold=threshold)
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
    assert counter.frame_count == 1


def test_alpha_as_a_number_compiles_at_most_once_more() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, alpha: nf.negtome(x, alpha=alpha, threshold=0.3), fullgraph=True, backend=counter
    )
    x = sample()
    for alpha in (0.9, 0.2, -0.5, 1.5, 0.7):
        torch.testing.assert_close(
            compiled(x, alpha), nf.negtome(x, alpha=alpha, threshold=0.3), rtol=0, atol=0
        )
    assert counter.frame_count <= 2


def test_compiled_gradients_agree() -> None:
    torch._dynamo.reset()
    x = sample().requires_grad_()
    function = lambda t: nf.negtome(t, "others", threshold=0.3).square().sum()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(function(x), x)
    (gradient,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("reference", ["first", "others"])
def test_fake_tensors_have_the_right_shapes(reference: str) -> None:
    with FakeTensorMode():
        x = torch.empty(4, 20, 16, dtype=torch.bfloat16)
        y = nf.negtome(x, reference, alpha=torch.tensor(0.5))
        similarity, index = nf.match_tokens(x, reference)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert similarity.shape == index.shape == (4, 20)
    assert similarity.dtype == torch.float32 and index.dtype == torch.int64


def test_exports_with_a_dynamic_number_of_tokens() -> None:
    layer = nf.NegToMe(threshold=0.3)
    x = sample().cpu()
    count = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {1: count}}, strict=False)
    torch.testing.assert_close(program.module()(x), layer(x))
    torch.testing.assert_close(program.module()(x[:, :11]), layer(x[:, :11]))


def test_a_plain_call_skips_the_dispatcher_and_computes_the_same() -> None:
    x = sample()
    number, limit = torch.tensor(0.9, device=DEVICE), torch.tensor(0.3, device=DEVICE)
    call = Call(x, x, Pairing("first", 4), alpha=number, threshold=limit)
    assert ops.can_skip_dispatcher(x)
    out = torch.empty_like(x)
    plain = (out, *ops.run(call, out, "torch"))
    values = ops.flat_arguments(call, "torch")
    for one, dispatched in zip(plain, ops.guide(*values), strict=True):
        assert torch.equal(one, dispatched)
    moved = x.clone()
    version = moved._version
    ops.run(call._replace(x=moved, reference=moved), moved, "torch")
    assert torch.equal(moved, ops.guide(*values)[0])
    assert moved._version > version, "autograd must learn that the tokens were written into"


@pytest.mark.parametrize("reference", ["first", "others"])
def test_a_default_device_of_the_caller_changes_nothing(reference: str) -> None:
    x = sample().cpu()
    expected = nf.negtome(x, reference, threshold=0.0, backend="torch")
    small.places_of.cache_clear()
    with torch.device("meta"):
        assert torch.equal(nf.negtome(x, reference, threshold=0.0, backend="torch"), expected)
    assert torch.equal(nf.negtome(x, reference, threshold=0.0, backend="torch"), expected)


def test_nothing_that_watches_is_skipped() -> None:
    x = sample()
    with FakeTensorMode():
        assert not ops.can_skip_dispatcher(x)
    for pre_dispatch in (False, True):
        traced = make_fx(lambda item: nf.negtome(item), pre_dispatch=pre_dispatch)(x)
        assert any(node.target is ops.guide._opoverload for node in traced.graph.nodes)
    assert not ops.can_skip_dispatcher(torch.nn.Parameter(x)), "a subclass may have its own meaning"
    assert not ops.can_skip_dispatcher(x.to("meta"))
    differentiated = x.clone().requires_grad_()
    assert not ops.can_skip_dispatcher(differentiated)
    with torch.no_grad():
        assert ops.can_skip_dispatcher(differentiated)
    seen = []

    def transformed(item: torch.Tensor) -> torch.Tensor:
        seen.append(ops.can_skip_dispatcher(item))
        return item

    torch.func.vmap(transformed)(x)
    with torch.autograd.forward_ad.dual_level():
        seen.append(ops.can_skip_dispatcher(torch.autograd.forward_ad.make_dual(x, x)))
    assert seen == [False, False]


def test_dropout_goes_with_dynamic_sizes() -> None:
    counter = CompileCounterWithBackend("eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def guided(x: torch.Tensor) -> torch.Tensor:
        return nf.negtome(x, threshold=0.0, dropout=0.5, backend="torch")

    for items in (3, 4, 5):
        x = sample(items=items)
        y = guided(x)
        spared = (y == x).all(dim=-1)
        assert spared[0].all() and 0 < spared[1:].float().mean() < 1
    assert counter.frame_count == 1
