"""Embedding nudging on Triton: means of the points in torch, then all steps in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import triton_runtime as runtime
from ...kernels.tuning import NUDGE
from ..call import NudgeCall
from .torch_backend import mean_of_points


def nudge(call: NudgeCall, out: Tensor, trace: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Write `out` and `trace`; return distance, steps and reason, each `(B,)`."""
    latents, unit = call.latents, call.objective == "cosine"
    runtime.require(latents)
    from ...kernels.nudge import nudge_kernel

    items, width = latents.shape
    latents = latents if latents.stride(1) == 1 else latents.contiguous()
    means = [
        None if p is None else mean_of_points(p, torch.float32, unit).contiguous()
        for p in (call.desired, call.undesired)
    ]
    distance = call.alpha.new_empty((items,))
    taken, reason = (latents.new_empty((items,), dtype=torch.int64) for _ in range(2))
    with runtime.launch_device(latents):
        nudge_kernel[(items,)](
            latents,
            *means,
            call.alpha.contiguous(),
            call.beta.contiguous(),
            call.radius.contiguous(),
            out,
            distance,
            taken,
            reason,
            trace,
            width,
            call.steps,
            call.step_size,
            call.tolerance,
            latents.stride(0),
            *(0 if m is None or m.shape[0] == 1 else m.stride(0) for m in means),
            OBJECTIVE=call.objective,
            INTERPRETED=runtime.interpreting(),
            BLOCK=min(NUDGE.BLOCK_K, 1 << max(width - 1, 1).bit_length()),
            num_warps=NUDGE.num_warps,
        )
    return distance, taken, reason
