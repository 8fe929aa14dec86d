"""The `torch.library` operator of `nudge`: schema, fake kernel, and the choice of backend."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..ops import resolve_backend
from .backends import naive, torch_backend


def _backend(name: str, latents: Tensor) -> ModuleType:
    name = resolve_backend(name, latents.device, latents.dtype)
    if name == "triton":
        from .backends import triton_backend

        return triton_backend
    if name == "reference":
        raise RuntimeError(
            "nudge with backend='reference' differentiates the objective, which compiled code "
            "cannot do inside an operator; use backend='torch' there"
        )
    return torch_backend


def run(
    latents: Tensor,
    desired: Tensor | None,
    undesired: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    radius: Tensor,
    objective: str,
    steps: int,
    step_size: float,
    tolerance: float,
    traced: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """`nudge`; the oracle, which needs autograd, is called beside the operator."""
    problem = (desired, undesired, alpha, beta, radius, objective, steps, step_size, tolerance)
    if torch.compiler.is_compiling() or (
        resolve_backend(backend, latents.device, latents.dtype) != "reference"
    ):
        return nudge(latents, *problem, traced, backend)
    out, trace = _empty(latents, alpha, steps, traced)
    results = naive.nudge(latents, *problem, out, trace if traced else None)
    return out, *results, trace


@torch.library.custom_op(
    "negtome_fast::nudge",
    mutates_args=(),
    schema="(Tensor latents, Tensor? desired, Tensor? undesired, Tensor alpha, Tensor beta, "
    "Tensor radius, str objective, int steps, float step_size, float tolerance, bool traced, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def nudge(
    latents: Tensor,
    desired: Tensor | None,
    undesired: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    radius: Tensor,
    objective: str,
    steps: int,
    step_size: float,
    tolerance: float,
    traced: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Latents `(B, n)`, distance, steps, reason `(B,)` and trace `(B, steps + 1 or 0)`.

    Points are `(P, K, n)` with P = 1 or B; alpha, beta and radius `(B,)` in the dtype of the
    arithmetic.
    """
    out, trace = _empty(latents, alpha, steps, traced)
    with torch.autocast(latents.device.type, enabled=False):
        results = _backend(backend, latents).nudge(
            latents,
            desired,
            undesired,
            alpha,
            beta,
            radius,
            objective,
            steps,
            step_size,
            tolerance,
            out,
            trace if traced else None,
        )
    return out, *results, trace


def _empty(latents: Tensor, alpha: Tensor, steps: int, traced: bool) -> tuple[Tensor, Tensor]:
    trace = alpha.new_empty((latents.shape[0], steps + 1 if traced else 0))
    return latents.new_empty(latents.shape), trace


@nudge.register_fake
def _(latents: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, alpha, _, _, _, steps, _, _, traced, _ = rest
    out, trace = _empty(latents, alpha, steps, traced)
    items = latents.shape[0]
    counts = [latents.new_empty((items,), dtype=torch.int64) for _ in range(2)]
    return out, alpha.new_empty((items,)), *counts, trace
