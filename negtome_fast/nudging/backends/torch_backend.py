"""Embedding nudging in the plane of L0 and g: one pass over the points, one over the latents.

Every iterate is L = (1 + p) L0 + q g, so its norm, its distance from L0 and <g, L> follow from the
three inner products of L0 and g, and a descent step changes two numbers per item.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...naive import saturated
from ..call import NudgeCall

TINY = 1e-12
CHUNK = 1 << 22
"""Elements of the points that are held in the dtype of the arithmetic at once."""


def mean_of_points(points: Tensor, dtype: torch.dtype, unit: bool) -> Tensor:
    """Mean over K of points `(P, K, n)`, scaled to length 1 if `unit`: `(P, n)` in `dtype`."""
    if not unit:
        return points.mean(dim=1, dtype=dtype)
    sets, count, width = points.shape
    total = points.new_zeros((sets, width), dtype=dtype)
    for part in points.split(max(1, CHUNK // (sets * width)), dim=1):
        total += F.normalize(part.to(dtype), dim=-1, eps=TINY).sum(dim=1)
    return total / count


def direction(call: NudgeCall) -> Tensor:
    """Return g = -alpha * mean(D) + beta * mean(U), `(B, n)`."""
    unit = call.objective == "cosine"
    parts = [
        weight[:, None] * mean_of_points(points, call.alpha.dtype, unit)
        for points, weight in ((call.desired, -call.alpha), (call.undesired, call.beta))
        if points is not None
    ]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class Plane:
    """The descent of all items at once: `(B,)` tensors of the coefficients p (L0) and q (g)."""

    def __init__(self, start: Tensor, g: Tensor, objective: str) -> None:
        self.objective = objective
        self.ss = (start * start).sum(dim=1)
        self.sg = (start * g).sum(dim=1)
        self.gg = (g * g).sum(dim=1)
        self.finite = (self.ss + self.gg).isfinite() & self.sg.isfinite()
        self.norm = self.ss.sqrt()
        # The cost of a unit of |L - L0|.
        self.slope = torch.ones_like(self.norm)
        if objective == "cosine":
            self.slope = 1 / self.norm.clamp_min(TINY)

    def length(self, p: Tensor, q: Tensor) -> Tensor:
        """|p L0 + q g|."""
        return (p * p * self.ss + 2 * p * q * self.sg + q * q * self.gg).clamp_min(0).sqrt()

    def value(self, p: Tensor, q: Tensor) -> Tensor:
        """The objective at L0 + p L0 + q g."""
        product = (1 + p) * self.sg + q * self.gg
        if self.objective == "cosine":
            product = product / self.length(1 + p, q).clamp_min(TINY)
        distance = self.length(p, q)
        if self.objective == "squared":
            return product + distance.square()
        return product + self.slope * distance

    def gradient(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of the gradient, or of the shortest subgradient at L0, which is a kink."""
        on_start, on_g = torch.zeros_like(p), torch.ones_like(q)
        if self.objective == "squared":
            return on_start, on_g / 2  # the way to the minimum, which replaces the gradient
        if self.objective == "cosine":
            norm = self.length(1 + p, q).clamp_min(TINY)
            product = (1 + p) * self.sg + q * self.gg
            on_start, on_g = -product * (1 + p) / norm**3, 1 / norm - product * q / norm**3
        distance = self.length(p, q)
        left = (1 - self.slope / self.length(on_start, on_g).clamp_min(TINY)).clamp_min(0)
        pull = self.slope / distance.clamp_min(TINY)
        at_start = distance == 0
        return (
            torch.where(at_start, on_start * left, on_start + pull * p),
            torch.where(at_start, on_g * left, on_g + pull * q),
        )


def nudge(call: NudgeCall, out: Tensor, trace: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Write `out` and `trace`; return distance, steps and reason, each `(B,)`."""
    start = call.latents.to(call.alpha.dtype)
    g = direction(call)
    plane = Plane(start, g, call.objective)
    squared = call.objective == "squared"
    p = q = torch.zeros_like(plane.norm)
    taken = torch.zeros_like(p, dtype=torch.int64)
    active, on_sphere = plane.finite, torch.zeros_like(plane.finite)
    converged, lost = torch.zeros_like(active), torch.zeros_like(active)
    size = torch.full_like(p, 1.0 if squared else call.step_size)
    if call.objective == "cosine":
        size = size * plane.ss
    if trace is not None:
        trace[:, :] = torch.where(active, plane.value(p, q), torch.nan)[:, None]
    for number in range(1 if squared else call.steps):
        along_start, along_g = plane.gradient(p, q)
        next_p, next_q = p - size * along_start, q - size * along_g
        distance = plane.length(next_p, next_q)
        lost = lost | (active & ~distance.isfinite())
        active = active & ~lost
        outside = distance >= call.radius
        shrink = torch.where(outside, call.radius / distance.clamp_min(TINY), 1.0)
        next_p, next_q = next_p * shrink, next_q * shrink
        still = plane.length(next_p - p, next_q - q) <= call.tolerance * plane.norm
        converged = converged | (active & still)
        active = active & ~still
        p, q = torch.where(active, next_p, p), torch.where(active, next_q, q)
        on_sphere = torch.where(active, outside, on_sphere)
        taken += active
        if trace is not None:
            value = torch.where(active, plane.value(p, q), trace[:, number])
            trace[:, number + 1 :] = value[:, None]
    if squared:
        converged = torch.ones_like(converged)
    reason = torch.where(converged, 0, 1)
    reason = torch.where(on_sphere, 2, reason)
    moved = start + p[:, None] * start + q[:, None] * g
    moved = saturated(moved, torch.empty_like(out))
    out.copy_(torch.where((taken > 0)[:, None], moved, call.latents))
    distance = torch.where(plane.finite, plane.length(p, q), 0.0)
    return distance, taken, torch.where(plane.finite & ~lost, reason, 3)
