"""`nudge`: descend the objective of embedding nudging from the given latents.

    minimise over L   -alpha * mean_D <D, L>  +  beta * mean_U <U, L>  +  |L - L0|

D are the desired points, U the undesired ones and L0 the given latents. The inner products
depend on the means alone, so hundreds of thousands of points cost one pass; and every iterate lies
in the plane of L0 and g = -alpha * mean(D) + beta * mean(U), so all steps are taken on two numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import get_args

import torch
from torch import Tensor

from ..arguments import check_dense
from ..ops import can_skip_dispatcher, check_backend_name
from . import ops
from .call import NudgeCall, Objective
from .schedule import MOST_STEPS

OBJECTIVES = get_args(Objective)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

LARGEST = torch.finfo(torch.float32).max
"""Largest step size and tolerance."""

REASONS = ("converged", "steps", "distance", "non-finite")
"""Reasons why an item stops; `NudgeResult.stopped` holds their indices."""


@dataclass(frozen=True)
class NudgeResult:
    """Latents that `nudge` moved, and how far each item went.

    Attributes:
        latents: same shape and dtype as the input; items that did not move are bit-identical.
        distance: `(B,)`, L2 distance from the input before rounding to its dtype.
        steps: `(B,)` int64, descent steps that moved the item.
        stopped: `(B,)` int64, an index of `REASONS`.
        trace: `(B, steps + 1)`, the objective at the start and after each step; the last value is
            repeated once an item has stopped. None without `return_trace`.
    """

    latents: Tensor
    distance: Tensor
    steps: Tensor
    stopped: Tensor
    trace: Tensor | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Reason why each item stopped; waits for the device.

        `"converged"`: a further step would not move it by `tolerance` of its norm (for "squared":
        the minimum was reached). `"steps"`: all steps were used. `"distance"`: the item is on the
        sphere of radius `max_distance`. `"non-finite"`: the item or its points hold a NaN or an
        infinity, and the item was not moved; or the next step would have left the range of fp32
        (fp64 for fp64), and was not taken.
        """
        return tuple(REASONS[code] for code in self.stopped.tolist())


@torch.no_grad()
def nudge(
    latents: Tensor,
    desired: Tensor | None = None,
    undesired: Tensor | None = None,
    *,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    objective: Objective = "paper",
    steps: int = 20,
    step_size: float = 0.05,
    max_distance: float | Tensor | None = None,
    tolerance: float = 1e-5,
    return_trace: bool = False,
    backend: str = "auto",
) -> NudgeResult:
    """Move latents away from undesired points and toward desired ones (arXiv 2408.15450).

    The objective is the paper's. Its optimiser, step count and weights are not published: plain
    gradient descent, the projection onto a trust radius and the defaults here are this project's.

    - `"paper"`: the objective as above. With g = -alpha mean(D) + beta mean(U) its minimum is L0
      where |g| <= 1; elsewhere it has none, and `steps`, `step_size` and `max_distance` bound the
      way along -g.
    - `"squared"`: |L - L0|^2 in place of the norm, minimised in closed form: L0 - g / 2, pulled
      back to `max_distance`. `steps`, `step_size` and `tolerance` are not used.
    - `"cosine"`: cosine similarities in place of the inner products and |L - L0| / |L0| in place of
      the norm, descended in units of |L0| (this project's choice: alpha, beta and `step_size`
      mean the same at any scale).

    Args:
        latents: `(B, ...)`, fp32, bf16, fp16 or fp64; an item is one vector of all its numbers.
        desired, undesired: points of the same space, `(K, ...)` shared by all items or
            `(B, K, ...)` for each item; same dtype and device as `latents`. None drops the term.
        alpha, beta: weights of the desired and the undesired points; a number or `(B,)`.
        steps: maximum number of descent steps, at least 1.
        step_size: factor of the gradient, positive. A step of "paper" is
            `step_size * (|g| - 1)` long; one of "cosine" is that share of |L0|, where |g| is at
            most `alpha + beta`.
        max_distance: trust radius, the largest L2 distance from the input: a number or `(B,)`,
            positive; None sets no limit. The values of tensors on an accelerator are not read, so
            that nothing waits for it: an item whose radius is not positive stays where it is, and
            so does one whose weight is not finite.
        tolerance: an item has converged when a step moves it by at most this share of its norm.
        return_trace: record the objective after each step.
        backend: `"auto"` (Triton on a GPU, else torch), `"triton"`, `"torch"` or `"reference"`.

    Returns:
        `NudgeResult`. Arithmetic is fp32 (fp64 for fp64), rounded once. Latents saturate at the
        largest finite number of their dtype: finite ones stay finite. Not differentiable.

    Raises:
        ValueError, TypeError: invalid arguments; the message names shapes.
        RuntimeError: `backend="triton"` where Triton cannot run.
    """
    _check_latents(latents)
    _check_descent(objective, steps, step_size, tolerance)
    check_backend_name(backend)
    toward = _points("desired", desired, latents)
    away = _points("undesired", undesired, latents)
    if toward is None and away is None:
        raise ValueError("nothing to steer by: hand over desired or undesired points, or both")
    radius = float("inf") if max_distance is None else max_distance
    call = NudgeCall(
        latents.flatten(1),
        toward,
        away,
        _per_item("alpha", alpha, latents),
        _per_item("beta", beta, latents),
        _per_item("max_distance", radius, latents, positive=True),
        objective,
        int(steps),
        float(step_size),
        float(tolerance),
        bool(return_trace),
        backend,
    )
    moved, distance, taken, stopped, trace = ops.run(call)
    return NudgeResult(
        moved.view(latents.shape), distance, taken, stopped, trace if return_trace else None
    )


def _check_latents(latents: Tensor) -> None:
    if not isinstance(latents, Tensor):
        raise TypeError(f"latents must be a tensor (B, ...), got {type(latents).__name__}")
    check_dense("latents", latents)
    if latents.dim() < 2:
        raise ValueError(f"latents must have the shape (B, ...), got {tuple(latents.shape)}")
    if latents.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"latents must be one of {names}, got {latents.dtype}")
    if latents.numel() == 0:
        raise ValueError(f"latents are empty: {tuple(latents.shape)}")


def _check_descent(objective: str, steps: int, step_size: float, tolerance: float) -> None:
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    for name, value in (("step_size", step_size), ("tolerance", tolerance)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, not {type(value).__name__}")
        largest = torch.finfo(torch.float64).max
        if not 0 <= value <= largest or (name == "step_size" and value == 0):
            raise ValueError(f"{name} must be positive and finite, got {value}")
        if value > LARGEST:
            raise ValueError(f"{name} must be at most {LARGEST:.4g}, got {value}")
    if steps > MOST_STEPS:
        raise ValueError(f"steps must be at most {MOST_STEPS}, got {steps!r:.40}")


def _points(name: str, points: Tensor | None, latents: Tensor) -> Tensor | None:
    """Return the points as `(P, K, n)` with P = 1 (shared) or B."""
    if points is None:
        return None
    if not isinstance(points, Tensor):
        raise TypeError(f"{name} must be a tensor of points, got {type(points).__name__}")
    check_dense(name, points)
    if points.dtype != latents.dtype or points.device != latents.device:
        raise TypeError(
            f"{name} and latents must share dtype and device; {name} is {points.dtype} on "
            f"{points.device}, latents are {latents.dtype} on {latents.device}"
        )
    items, *shape = latents.shape
    shared = list(points.shape[1:]) == shape
    if not shared and (list(points.shape[2:]) != shape or points.shape[0] != items):
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"{name} must have the shape (K, {wanted}) or ({items}, K, {wanted}), "
            f"got {tuple(points.shape)}"
        )
    points = points[None] if shared else points
    if points.shape[1] == 0:
        raise ValueError(f"{name} holds no points: {tuple(points.shape)}; None leaves them out")
    return points.flatten(2)


def _per_item(
    name: str, value: float | Tensor, latents: Tensor, *, positive: bool = False
) -> Tensor:
    """Return a weight as `(B,)` in the dtype of the arithmetic, on the device of the latents."""
    items = latents.shape[0]
    dtype = torch.float64 if latents.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
        largest = torch.finfo(dtype).max
        right = value > 0 if positive else abs(value) <= largest
        if not right:
            wanted = "positive" if positive else "finite"
            raise ValueError(f"{name} must be {wanted}, got {value}")
        value = float(value) if abs(value) <= largest else float("inf")
        return torch.full((items,), value, dtype=dtype, device=latents.device)
    check_dense(name, value)
    if value.shape not in ((), (1,), (items,)):
        raise ValueError(
            f"{name} must be a number or one for each of the {items} items, "
            f"got the shape {tuple(value.shape)}"
        )
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be real numbers, got {value.dtype}")
    given = value.detach().to(latents.device, dtype).expand(items).contiguous()
    if value.is_cpu and can_skip_dispatcher(given):
        right = given > 0 if positive else given.isfinite()
        if not bool(right.all()):
            wanted = "positive" if positive else "finite"
            raise ValueError(f"{name} must be {wanted}, got {value.tolist()}")
    elif positive:
        # Reading the values would wait for the device: such an item stays where it is instead.
        given = torch.where(given > 0, given, torch.finfo(dtype).tiny)
    return given
