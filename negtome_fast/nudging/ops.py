"""The `torch.library` operator of `nudge`: schema, fake kernel, and the choice of backend."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..ops import resolve_backend
from .backends import naive, torch_backend
from .call import NudgeCall


def run(call: NudgeCall) -> tuple[Tensor, ...]:
    """Return latents `(B, n)`, distance, steps, reason `(B,)` and trace `(B, steps + 1 or 0)`.

    The naive backend needs autograd, so it is called directly and not through the operator.
    """
    latents = call.latents
    if torch.compiler.is_compiling() or (
        resolve_backend(call.backend, latents.device, latents.dtype) != "reference"
    ):
        return nudge(*call)
    out, trace = _empty(call)
    results = naive.nudge(call, out, trace if call.traced else None)
    return out, *results, trace


@torch.library.custom_op(
    "negtome_fast::nudge",
    mutates_args=(),
    schema="(Tensor latents, Tensor? desired, Tensor? undesired, Tensor alpha, Tensor beta, "
    "Tensor radius, str objective, int steps, float step_size, float tolerance, bool traced, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def nudge(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the chosen backend; the arguments are the fields of `NudgeCall`, in their order."""
    call = NudgeCall(*arguments)
    out, trace = _empty(call)
    with torch.autocast(call.latents.device.type, enabled=False):
        results = _backend(call).nudge(call, out, trace if call.traced else None)
    return out, *results, trace


@nudge.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call = NudgeCall(*arguments)
    out, trace = _empty(call)
    items = call.latents.shape[0]
    counts = [call.latents.new_empty((items,), dtype=torch.int64) for _ in range(2)]
    return out, call.alpha.new_empty((items,)), *counts, trace


def _backend(call: NudgeCall) -> ModuleType:
    name = resolve_backend(call.backend, call.latents.device, call.latents.dtype)
    if name == "triton":
        from .backends import triton_backend

        return triton_backend
    if name == "reference":
        raise RuntimeError(
            "nudge with backend='reference' differentiates the objective, which compiled code "
            "cannot do inside an operator; use backend='torch' there"
        )
    return torch_backend


def _empty(call: NudgeCall) -> tuple[Tensor, Tensor]:
    """Uninitialised latents and trace; the trace has no columns unless it is recorded."""
    columns = call.steps + 1 if call.traced else 0
    trace = call.alpha.new_empty((call.latents.shape[0], columns))
    return call.latents.new_empty(call.latents.shape), trace
