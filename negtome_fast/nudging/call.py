"""`NudgeCall`: the checked arguments of one call of `nudge`, on their way to a backend."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Objective = Literal["paper", "squared", "cosine"]


class NudgeCall(NamedTuple):
    """Checked arguments of `nudge`, in the order of the schema of `torch.ops.negtome_fast.nudge`.

    Attributes:
        latents: `(B, n)`; an item is one vector.
        desired, undesired: `(P, K, n)` with P = 1 (shared by all items) or B; None: no such points.
        alpha, beta, radius: `(B,)`, in the dtype of the arithmetic.
        objective: one of `OBJECTIVES`.
        steps, step_size, tolerance: as in `nudge`.
        traced: record the objective after each step.
        backend: the name that the caller chose, which may be `"auto"`.
    """

    latents: Tensor
    desired: Tensor | None
    undesired: Tensor | None
    alpha: Tensor
    beta: Tensor
    radius: Tensor
    objective: str
    steps: int
    step_size: float
    tolerance: float
    traced: bool
    backend: str
