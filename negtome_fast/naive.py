"""The definition of the operator in a few lines of plain torch, any dtype, O(N * M) memory.

It is the oracle of all tests, written to be read, not to be fast.

    y_i = x_i + alpha * (x_i - r_j)   where   j = argmax_j cos(x_i, r_j)   and   cos > threshold
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call

NOTHING = float("-inf")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_slot(value: Tensor, x: Tensor, slots: int) -> Tensor:
    """Expand `alpha` or `threshold` to `(slots,)` on the device of `x`, in its `compute_dtype`.

    If the host knows the number, it is filled in: a copy would wait for the device.
    """
    dtype = compute_dtype(x.dtype)
    if value.device.type == "cpu" and x.device.type != "cpu" and value.numel() == 1:
        value = torch.full((), float(value), dtype=dtype, device=x.device)
    return value.to(x.device, dtype).expand(slots)


def saturated(values: Tensor, out: Tensor) -> Tensor:
    """Round `values`, of the dtype of the arithmetic, into `out`: no finite one becomes infinite.

    Beyond the range of the dtype of `out` the result is its largest finite number, or the negative
    of that; NaN stays NaN. `out` may be `values`, which may be changed. Returns `out`.
    """
    limit = torch.finfo(out.dtype).max
    if out.dtype == values.dtype:
        return torch.clamp(values, -limit, limit, out=out)
    return out.copy_(values.clamp_(-limit, limit))


class Saturated(torch.autograd.Function):
    """`saturated` of `(values, dtype)` as a new tensor; the gradient passes, as through a rounding.

    So it is in the operator: saturation is a constant of the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = values.dtype
        return saturated(values.clone(), torch.empty_like(values, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


def is_finite(tokens: Tensor) -> Tensor:
    """Return True for each token `(..., D)` of finite norm; others are never matched."""
    return torch.linalg.vector_norm(tokens, dim=-1).isfinite()


def match_pair(
    source: Tensor, reference: Tensor, allowed: Tensor, matching: str
) -> tuple[Tensor, Tensor]:
    """Find the best matches of a source item `(N, D)` in a reference item `(M, D)`.

    Returns:
        Similarity and index `(N,)`: of each source token's best reference token for `"paper"`, of
        each reference token's best source token for `"official"`; -inf and -1 without a match.
    """
    similarity = F.normalize(source, dim=-1) @ F.normalize(reference, dim=-1).T
    source_ok, reference_ok = is_finite(source), is_finite(reference)
    similarity = similarity.where(source_ok[:, None] & reference_ok, NOTHING)
    if matching == "paper":
        best, index = similarity.where(allowed, NOTHING).max(dim=1)
    else:
        best, index = similarity.max(dim=0)
        best = best.where(allowed & source_ok & reference_ok[index], NOTHING)
    return best, index.where(best > NOTHING, -1)


def match(call: Call) -> tuple[Tensor, Tensor]:
    """Find the best reference token of every source token, separately for each slot.

    Returns:
        Similarity (fp32, fp64 for fp64) and token index (int64), each `(B, slots, N)`; -inf and -1
        where nothing matches.
    """
    x, pairing, reference_mask = call.x, call.pairing, call.reference_mask
    dtype = compute_dtype(x.dtype)
    if reference_mask is None:
        reference_mask = torch.ones(call.reference.shape[:2], dtype=torch.bool, device=x.device)
    shape = (x.shape[0], pairing.slots, x.shape[1])
    similarity = torch.full(shape, NOTHING, dtype=dtype, device=x.device)
    index = torch.full(shape, -1, device=x.device)
    for item in pairing.sources:
        for slot in range(pairing.slots):
            other = pairing.reference_item(item, slot)
            source, reference = x[item].to(dtype), call.reference[other].to(dtype)
            similarity[item, slot], index[item, slot] = match_pair(
                source, reference, reference_mask[other], call.matching
            )
    return similarity, index


def guide(call: Call, out: Tensor) -> tuple[Tensor, Tensor]:
    """Write `x`, pushed away from its matches, to `out` `(B, N, D)`, which may be `x` itself.

    Returns:
        Similarity (fp32, fp64 for fp64), -inf where nothing matches; and `slot * M + token` (int64)
        of the reference token that a token was pushed away from, -1 where it stayed. Each is
        `(B, S, N)`, where S is 1 for `combine="nearest"`, else the number of slots.
    """
    x, reference, pairing = call.x, call.reference, call.pairing
    dtype = compute_dtype(x.dtype)
    alpha = per_slot(call.alpha, x, pairing.slots)
    threshold = per_slot(call.threshold, x, pairing.slots)
    similarity, index = match(call)
    pushed = (similarity > threshold[:, None]) & (index >= 0)
    if call.source_mask is not None:
        pushed &= call.source_mask[:, None]
    nearest = call.combine == "nearest" and pairing.slots > 0
    if nearest:
        pushed &= F.one_hot(similarity.argmax(dim=1), pairing.slots).bool().movedim(-1, 1)

    result = x.clone()
    for item in pairing.sources:
        original = x[item].to(dtype)
        moved = original.clone()
        for slot in range(pairing.slots):
            chosen = reference[pairing.reference_item(item, slot)].to(dtype)[index[item, slot]]
            step = alpha[slot] * (original - chosen)
            moved += torch.where(pushed[item, slot, :, None], step, 0.0)
            saturated(moved, moved)
        moved = saturated(moved, torch.empty_like(x[item]))
        result[item] = torch.where(pushed[item].any(0)[:, None], moved, x[item])
    out.copy_(result)

    slots = torch.arange(pairing.slots, device=x.device)[:, None]
    moved_to = torch.where(pushed, slots * reference.shape[1] + index, -1)
    if nearest:
        return similarity.amax(dim=1, keepdim=True), moved_to.amax(dim=1, keepdim=True)
    return similarity, moved_to
