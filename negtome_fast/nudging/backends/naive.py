"""Embedding nudging as it is defined, with every point and every gradient: the oracle of the tests.

f(L) = -alpha * mean_D <D, L> + beta * mean_U <U, L> + |L - L0|
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...naive import saturated
from ..call import NudgeCall

TINY = 1e-12
CONVERGED, STEPS, DISTANCE, NON_FINITE = range(4)  # indices of `REASONS`


def nudge(call: NudgeCall, out: Tensor, trace: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Write `out` and `trace`; return distance, steps and reason, each `(B,)`."""
    distances, counts, reasons = [], [], []
    for item in range(call.latents.shape[0]):
        moved, distance, taken, reason, values = descend(ItemProblem(call, item), call)
        out[item] = saturated(moved, torch.empty_like(out[item])) if taken else call.latents[item]
        distances.append(distance)
        counts.append(taken)
        reasons.append(reason)
        if trace is not None:
            trace[item] = torch.stack(values)
    device = call.latents.device
    return (
        torch.stack(distances),
        torch.tensor(counts, device=device),
        torch.tensor(reasons, device=device),
    )


def descend(problem: ItemProblem, call: NudgeCall) -> tuple[Tensor, Tensor, int, int, list[Tensor]]:
    """Return latents `(n,)`, distance, steps taken, reason and trace of one item."""
    start = problem.start
    if not problem.is_finite():
        nothing = [start.new_full((), float("nan"))] * (call.steps + 1)
        return start, start.new_zeros(()), 0, NON_FINITE, nothing
    latents, taken, on_sphere, trace = start, 0, False, [problem.value(start)]
    reason = STEPS
    for _ in range(call.steps):
        proposal = problem.step(latents, taken == 0, call.step_size)
        if not bool((proposal - start).norm().isfinite()):
            reason = NON_FINITE
            break
        proposal, at_radius = problem.project(proposal)
        if (proposal - latents).norm() <= call.tolerance * start.norm():
            reason = DISTANCE if on_sphere else CONVERGED
            break
        latents, on_sphere, taken = proposal, at_radius, taken + 1
        reason = DISTANCE if on_sphere else STEPS
        trace.append(problem.value(latents))
        if call.objective == "squared":
            reason = DISTANCE if on_sphere else CONVERGED
            break
    trace += [trace[-1]] * (call.steps + 1 - len(trace))
    return latents, (latents - start).norm(), taken, reason, trace


class ItemProblem:
    """Objective of one item, with its points and weights in the dtype of the arithmetic."""

    def __init__(self, call: NudgeCall, item: int) -> None:
        def own(points: Tensor | None) -> Tensor | None:
            if points is None:
                return None
            return points[item if points.shape[0] > 1 else 0].to(call.alpha.dtype)

        self.start = call.latents[item].to(call.alpha.dtype)
        self.desired, self.undesired = own(call.desired), own(call.undesired)
        self.alpha, self.beta, self.radius = call.alpha[item], call.beta[item], call.radius[item]
        self.objective = call.objective

    def is_finite(self) -> bool:
        parts = (self.start, self.desired, self.undesired)
        return all(bool(part.isfinite().all()) for part in parts if part is not None)

    def value(self, latents: Tensor) -> Tensor:
        return (self.attraction(latents) + self.distance_term(latents)).detach()

    def attraction(self, latents: Tensor) -> Tensor:
        """Terms of the desired and the undesired points."""
        return self._term(latents, self.desired, self.alpha, -1.0) + self._term(
            latents, self.undesired, self.beta, 1.0
        )

    def _term(self, latents: Tensor, points: Tensor | None, weight: Tensor, sign: float) -> Tensor:
        """`sign * weight * mean over the points (K, n) of <point, L>`, or of their cosine."""
        if points is None:
            return latents.new_zeros(())
        products = points @ latents
        if self.objective == "cosine":
            norms = points.norm(dim=1).clamp_min(TINY) * latents.norm().clamp_min(TINY)
            products = products / norms
        return sign * weight * products.mean()

    def distance_term(self, latents: Tensor) -> Tensor:
        distance = (latents - self.start).norm()
        if self.objective == "cosine":
            return distance / self.start.norm().clamp_min(TINY)
        return distance.square() if self.objective == "squared" else distance

    def step(self, latents: Tensor, first: bool, step_size: float) -> Tensor:
        """Latents after one step, before the projection; `"squared"` goes to its minimum."""
        start = self.start
        with torch.enable_grad():
            variable = latents.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.attraction(variable), variable)
        if self.objective == "squared":
            return start - gradient / 2
        slope = 1.0 if self.objective == "paper" else 1 / start.norm().clamp_min(TINY)
        offset = latents - start
        if first:
            # The norm has a kink at L0: take the subgradient that leaves the shortest gradient.
            gradient = gradient * (1 - slope / gradient.norm().clamp_min(TINY)).clamp_min(0)
        else:
            gradient = gradient + slope * offset / offset.norm().clamp_min(TINY)
        unit = start.norm() if self.objective == "cosine" else 1.0
        return latents - step_size * unit**2 * gradient

    def project(self, latents: Tensor) -> tuple[Tensor, bool]:
        """Latents pulled back to the trust radius, and True if they lay outside it."""
        distance = (latents - self.start).norm()
        if distance < self.radius:
            return latents, False
        return self.start + (latents - self.start) * (self.radius / distance), True
