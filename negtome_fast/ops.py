"""`torch.library` operators: schema, fake kernels, gradients, and the choice of backend.

`negtome_fast::guide` and `guide_` (in place) match and push; `negtome_fast::match` only matches.
In the backward pass the choice of match is constant: `dL/dx_i = (1 + alpha) g_i` where token i
was pushed, and `dL/dr_j = -alpha * sum of g_i` over the tokens pushed away from `r_j`. Saturation
is treated as rounding is: the gradient passes. Gradients may overflow, as loss scalers expect.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import naive
from .backends import torch_backend
from .call import Call
from .pairing import Mode, Pairing, pairing_of

BACKENDS = ("auto", "triton", "torch", "reference")
BACKEND_VARIABLE = "NEGTOME_FAST_BACKEND"


def check_backend_name(name: str) -> None:
    """Raise `ValueError` unless `name` is a backend."""
    if type(name) is not str or name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r:.80}")


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that serves `device` and `dtype`: "triton", "torch" or "reference".

    Raises:
        ValueError: an unknown name; or "triton" for fp64.
        RuntimeError: Triton was asked for by name, but cannot run here; the message says why.
    """
    from .backends import triton_runtime

    if name == "auto":
        name = os.environ.get(BACKEND_VARIABLE, "auto") or "auto"
    check_backend_name(name)
    if name == "auto":
        usable = device.type == "cuda" and dtype != torch.float64
        return "triton" if usable and triton_runtime.available(device)[0] else "torch"
    if name == "triton":
        if dtype == torch.float64:
            raise ValueError("the Triton backend computes in fp32; use backend='torch' for fp64")
        ready, reason = triton_runtime.available(device)
        if not ready:
            raise RuntimeError(f"backend='triton' cannot run here: {reason}")
    return name


def runs_torch(name: str) -> bool:
    """Return True if this name means the torch backend on a CPU, and autocast is off."""
    if name == "auto" and not os.environ.get(BACKEND_VARIABLE):
        name = "torch"
    return name == "torch" and not torch.is_autocast_enabled("cpu")


def _backend_of(name: str, x: Tensor) -> ModuleType:
    """The module that serves `x`. It is chosen while the operator runs: no compiler traces it."""
    if name == "auto" and x.is_cpu and not os.environ.get(BACKEND_VARIABLE):
        return torch_backend
    name = resolve_backend(name, x.device, x.dtype)
    if name == "triton":
        from .backends import triton_backend

        return triton_backend
    return naive if name == "reference" else torch_backend


def run(call: Call, out: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Guide without torch's dispatcher; only where `can_skip_dispatcher`.

    The result is written to `out`, which may be `call.x`.

    Returns:
        similarity and pushed, as `functional.guide_tokens`.
    """
    module = _backend_of(backend, call.x)
    if torch.is_grad_enabled():
        with torch.no_grad(), _without_autocast(call.x):
            result: tuple[Tensor, Tensor] = module.guide(call, out)
    else:
        with _without_autocast(call.x):
            result = module.guide(call, out)
    if out is call.x:
        torch.autograd.graph.increment_version(out)
    return result


_nothing = nullcontext()


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Context without autocast, which would round what must be exact."""
    if not torch.is_autocast_enabled(x.device.type):
        return _nothing
    return torch.autocast(x.device.type, enabled=False)


def _empty_pair(x: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Uninitialised similarity and index, of the shapes and dtypes that a backend returns."""
    shape = (x.shape[0], slots, x.shape[1])
    dtype = naive.compute_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=torch.int64)


# Looked up once: with cold caches, every attribute on the way to a function costs.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_modes_before_dispatch = torch._ops._len_torch_dispatch_stack_pre_dispatch
_tracing = torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack


def can_skip_dispatcher(*tensors: Any) -> bool:
    """Return True if an operator may run without torch's dispatcher.

    The dispatcher costs more than a small match. It is not needed if nothing is compiled, traced,
    differentiated or transformed, no mode is on, and all arguments that are not None are plain
    tensors with values.
    """
    if (
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or _modes_before_dispatch()
        or _tracing() is not None
        or _transforms() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    differentiated = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) is not Tensor
            or tensor.is_meta
            # The memory of these says less, or something else, than their values.
            or tensor.is_neg()
            or tensor.layout is not torch.strided
            or tensor.is_nested
            or (differentiated and tensor.requires_grad)
        ):
            return False
    return True


def check_transforms(x: Tensor, reference: Tensor | None, inplace: bool) -> None:
    """Raise `RuntimeError` for transforms of torch that the operators do not have.

    They are the derivatives of forward mode, for which torch would return zero, and of
    `torch.func`, and `vmap` in place. Not needed where `can_skip_dispatcher`.
    """
    if torch.compiler.is_compiling():
        return
    if inplace and torch._C._functorch.is_batchedtensor(x):
        raise RuntimeError("inplace=True does not work under torch.vmap; use inplace=False")
    given = [tensor for tensor in (x, reference) if tensor is not None]
    forward = forward_ad._current_level >= 0
    if forward and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        raise RuntimeError(
            "negtome has no forward-mode derivative (torch.func.jvp, dual numbers); "
            "use torch.autograd.grad"
        )
    levels = torch._C._functorch.get_interpreter_stack() or ()
    under_grad = any(level.key() == torch._C._functorch.TransformType.Grad for level in levels)
    if under_grad and any(tensor.requires_grad for tensor in given):
        raise RuntimeError(
            "negtome has no derivative under torch.func (grad, vjp, jacrev, hessian); "
            "use torch.autograd.grad"
        )


# ---------------------------------------------------------------------------------------------
# A call as the flat arguments of a schema
# ---------------------------------------------------------------------------------------------
_PAIRING = "str pairing_mode, int groups, bool per_item, str matching"
_ARGUMENTS = (
    "Tensor? reference, Tensor alpha, Tensor threshold, Tensor? reference_mask, "
    f"Tensor? source_mask, {_PAIRING}, str combine, str backend"
)


def flat_arguments(call: Call, backend: str) -> tuple[Any, ...]:
    """Arguments of `guide` and `guide_`; references that are `x` itself are None there."""
    pairing = call.pairing
    return (
        call.x,
        call.reference if pairing.mode == "external" else None,
        *(call.alpha, call.threshold, call.reference_mask, call.source_mask),
        *(pairing.mode, pairing.groups, pairing.per_item),
        *(call.matching, call.combine, backend),
    )


def _call(
    x: Tensor,
    reference: Tensor | None,
    alpha: Tensor,
    threshold: Tensor,
    reference_mask: Tensor | None,
    source_mask: Tensor | None,
    pairing_mode: Mode,
    groups: int,
    per_item: bool,
    matching: str,
    combine: str,
    backend: str,
) -> Call:
    """Undo `flat_arguments`."""
    pairing = _pairing(x, reference, pairing_mode, groups, per_item)
    target = x if reference is None else reference
    return Call(
        *(x, target, pairing, reference_mask, matching),
        *(alpha, threshold, source_mask, combine),
    )


def _pairing(
    x: Tensor, reference: Tensor | None, pairing_mode: Mode, groups: int, per_item: bool
) -> Pairing:
    items = x.shape[0]
    if reference is None:
        return pairing_of(pairing_mode, items, groups)
    count = reference.shape[0] // items if per_item else reference.shape[0]
    return pairing_of("external", items, groups, count, per_item)


def _empty_results(call: Call) -> tuple[Tensor, Tensor]:
    return _empty_pair(call.x, call.pairing.slots if call.combine == "sum" else 1)


# ---------------------------------------------------------------------------------------------
# The operators
# ---------------------------------------------------------------------------------------------
@torch.library.custom_op(
    "negtome_fast::match",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? reference, Tensor? reference_mask, {_PAIRING}, str backend) "
    "-> (Tensor, Tensor)",
)
def match(
    x: Tensor,
    reference: Tensor | None,
    reference_mask: Tensor | None,
    pairing_mode: Mode,
    groups: int,
    per_item: bool,
    matching: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Find the best reference token in every slot: similarity and token index `(B, slots, N)`."""
    pairing = _pairing(x, reference, pairing_mode, groups, per_item)
    call = Call(x, x if reference is None else reference, pairing, reference_mask, matching)
    with _without_autocast(x):
        result: tuple[Tensor, Tensor] = _backend_of(backend, x).match(call)
    return result


@match.register_fake
def _(x: Tensor, reference: Tensor | None, _mask: Tensor | None, *rest: Any) -> Any:
    return _empty_pair(x, _pairing(x, reference, *rest[:3]).slots)


@torch.library.custom_op(
    "negtome_fast::guide",
    mutates_args=(),
    schema=f"(Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def guide(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Match and push; returns what `functional.guide_tokens` returns."""
    call = _call(*arguments)
    out = call.x.new_empty(call.x.shape)
    with _without_autocast(call.x):
        similarity, pushed = _backend_of(arguments[-1], call.x).guide(call, out)
    return out, similarity, pushed


@guide.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _call(*arguments)
    return call.x.new_empty(call.x.shape), *_empty_results(call)


@torch.library.custom_op(
    "negtome_fast::guide_",
    mutates_args=("x",),
    schema=f"(Tensor(a!) x, {_ARGUMENTS}) -> (Tensor, Tensor)",
)
def guide_(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Do what `guide` does in place; returns similarity and pushed."""
    call = _call(*arguments)
    with _without_autocast(call.x):
        result: tuple[Tensor, Tensor] = _backend_of(arguments[-1], call.x).guide(call, call.x)
    return result


@guide_.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(_call(*arguments))


def _guide_negated(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`guide_` of views that negate lazily, such as `z.conj().imag`: the memory is the negative.

    torch's own answer to them cannot write into the view of an operator that returns other tensors.
    """
    values = (v.resolve_neg() if isinstance(v, Tensor) else v for v in rest)
    resolved = x.resolve_neg()
    result: tuple[Tensor, Tensor] = guide_(resolved, *values)
    if resolved is not x:
        x.copy_(resolved)
    return result


guide_._lib.impl("guide_", _guide_negated, "Negative")


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = _call(*inputs)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[2], call.alpha)
    ctx.pairing = call.pairing
    ctx.in_batch = call.pairing.mode != "external"
    ctx.reference_shape = call.reference.shape


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    pushed, alpha = ctx.saved_tensors
    pairing, (items, tokens, channels) = ctx.pairing, ctx.reference_shape
    dtype = naive.compute_dtype(grad.dtype)
    wide = grad.to(dtype)
    slot, token = pushed.clamp_min(0) // tokens, pushed.clamp_min(0) % tokens
    alpha = alpha.to(grad.device, dtype).expand(pairing.slots)
    alpha = torch.where(pushed >= 0, alpha[slot], 0.0)

    grad_x = wide * (1 + alpha.sum(dim=1))[..., None]
    grad_reference = None
    if ctx.in_batch or ctx.needs_input_grad[1]:
        item = torch.arange(pushed.shape[0], device=grad.device)[:, None, None]
        row = pairing.reference_item(item, slot) * tokens + token
        grad_reference = wide.new_zeros(items * tokens, channels)
        for number in range(pushed.shape[1]):
            # A product with zero would not do: the gradient of a token left alone may be inf.
            moved = (pushed[:, number] >= 0)[..., None]
            pull = torch.where(moved, -alpha[:, number, :, None] * wide, 0.0)
            grad_reference = grad_reference.index_add(
                0, row[:, number].flatten(), pull.flatten(0, 1)
            )
        grad_reference = grad_reference.view(items, tokens, channels)
        if ctx.in_batch:
            grad_x, grad_reference = grad_x + grad_reference, None
        else:
            grad_reference = grad_reference.to(grad.dtype)
    return grad_x.to(grad.dtype), grad_reference, *([None] * 10)


guide.register_autograd(_backward, setup_context=_save_for_backward)
