"""Embedding nudging as it is defined, with every point and every gradient: the oracle of the tests.

f(L) = -alpha * mean_D <D, L> + beta * mean_U <U, L> + |L - L0|
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-12


def terms(
    latents: Tensor, points: Tensor | None, weight: Tensor, sign: float, objective: str
) -> Tensor:
    """`sign * weight * mean over the points (K, n) of <point, L>`, or of their cosine."""
    if points is None:
        return latents.new_zeros(())
    products = points @ latents
    if objective == "cosine":
        norms = points.norm(dim=1).clamp_min(TINY) * latents.norm().clamp_min(TINY)
        products = products / norms
    return sign * weight * products.mean()


def distance_term(latents: Tensor, start: Tensor, objective: str) -> Tensor:
    distance = (latents - start).norm()
    if objective == "cosine":
        return distance / start.norm().clamp_min(TINY)
    return distance.square() if objective == "squared" else distance


def nudge_item(
    start: Tensor,
    desired: Tensor | None,
    undesired: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    radius: Tensor,
    objective: str,
    steps: int,
    step_size: float,
    tolerance: float,
) -> tuple[Tensor, Tensor, int, int, list[Tensor]]:
    """One item `(n,)`: latents, distance, steps, reason (an index of `REASONS`), trace."""

    def attraction(latents: Tensor) -> Tensor:
        return terms(latents, desired, alpha, -1.0, objective) + terms(
            latents, undesired, beta, 1.0, objective
        )

    def value(latents: Tensor) -> Tensor:
        return (attraction(latents) + distance_term(latents, start, objective)).detach()

    def project(latents: Tensor) -> tuple[Tensor, bool]:
        distance = (latents - start).norm()
        if distance < radius:
            return latents, False
        return start + (latents - start) * (radius / distance), True

    if not all(bool(p.isfinite().all()) for p in (start, desired, undesired) if p is not None):
        return start, start.new_zeros(()), 0, 3, [start.new_full((), float("nan"))] * (steps + 1)
    latents, taken, on_sphere, trace = start, 0, False, [value(start)]
    reason = 1
    for _ in range(steps):
        with torch.enable_grad():
            variable = latents.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(attraction(variable), variable)
        if objective == "squared":
            proposal = start - gradient / 2  # the minimum itself
        else:
            slope = 1.0 if objective == "paper" else 1 / start.norm().clamp_min(TINY)
            offset = latents - start
            if taken == 0:
                # The norm has a kink here: of its subgradients, the one that leaves least.
                gradient = gradient * (1 - slope / gradient.norm().clamp_min(TINY)).clamp_min(0)
            else:
                gradient = gradient + slope * offset / offset.norm().clamp_min(TINY)
            unit = start.norm() if objective == "cosine" else 1.0
            proposal = latents - step_size * unit**2 * gradient
        proposal, at_radius = project(proposal)
        if (proposal - latents).norm() <= tolerance * start.norm():
            reason = 2 if on_sphere else 0
            break
        latents, on_sphere, taken = proposal, at_radius, taken + 1
        reason = 2 if on_sphere else 1
        trace.append(value(latents))
        if objective == "squared":
            reason = 2 if on_sphere else 0
            break
    trace += [trace[-1]] * (steps + 1 - len(trace))
    return latents, (latents - start).norm(), taken, reason, trace


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
    out: Tensor,
    trace: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All items; writes `out` and `trace`, returns distance, steps and reason, each `(B,)`."""
    dtype = alpha.dtype

    def own(points: Tensor | None, item: int) -> Tensor | None:
        return None if points is None else points[item if points.shape[0] > 1 else 0].to(dtype)

    distances, counts, reasons = [], [], []
    for item in range(latents.shape[0]):
        moved, distance, taken, reason, values = nudge_item(
            latents[item].to(dtype),
            own(desired, item),
            own(undesired, item),
            alpha[item],
            beta[item],
            radius[item],
            objective,
            steps,
            step_size,
            tolerance,
        )
        out[item] = moved.to(out.dtype) if taken else latents[item]
        distances.append(distance)
        counts.append(taken)
        reasons.append(reason)
        if trace is not None:
            trace[item] = torch.stack(values)
    device = latents.device
    return (
        torch.stack(distances),
        torch.tensor(counts, device=device),
        torch.tensor(reasons, device=device),
    )
