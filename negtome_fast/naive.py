"""The definition of the operator in a few lines of plain torch, any dtype, O(N * M) memory.

It is the oracle of all tests, written to be read, not to be fast.

    y_i = x_i + alpha * (x_i - r_j)   where   j = argmax_j cos(x_i, r_j)   and   cos > threshold
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairing import Pairing

NOTHING = float("-inf")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_slot(value: Tensor, x: Tensor, slots: int) -> Tensor:
    """`alpha` or `threshold` `(slots,)` on the device of `x`, in its `compute_dtype`.

    A number that the host knows is the argument of a fill: a copy would wait for the device.
    """
    dtype = compute_dtype(x.dtype)
    if value.device.type == "cpu" and x.device.type != "cpu" and value.numel() == 1:
        value = torch.full((), float(value), dtype=dtype, device=x.device)
    return value.to(x.device, dtype).expand(slots)


def is_finite(tokens: Tensor) -> Tensor:
    """Tokens `(..., D)` that take part, `(...)` bool: those of finite norm."""
    return torch.linalg.vector_norm(tokens, dim=-1).isfinite()


def match_pair(
    source: Tensor, reference: Tensor, allowed: Tensor, matching: str
) -> tuple[Tensor, Tensor]:
    """Best match of one source item `(N, D)` in one reference item `(M, D)`: similarity, index."""
    similarity = F.normalize(source, dim=-1) @ F.normalize(reference, dim=-1).T
    source_ok, reference_ok = is_finite(source), is_finite(reference)
    similarity = similarity.where(source_ok[:, None] & reference_ok, NOTHING)
    if matching == "paper":
        best, index = similarity.where(allowed, NOTHING).max(dim=1)
    else:
        best, index = similarity.max(dim=0)
        best = best.where(allowed & source_ok & reference_ok[index], NOTHING)
    return best, index.where(best > NOTHING, -1)


def match(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    reference_mask: Tensor | None,
    matching: str,
) -> tuple[Tensor, Tensor]:
    """Similarity and token index, each `(B, slots, N)`; -inf and -1 where nothing matches."""
    dtype = compute_dtype(x.dtype)
    if reference_mask is None:
        reference_mask = torch.ones(reference.shape[:2], dtype=torch.bool, device=x.device)
    shape = (x.shape[0], pairing.slots, x.shape[1])
    similarity = torch.full(shape, NOTHING, dtype=dtype, device=x.device)
    index = torch.full(shape, -1, device=x.device)
    for item in pairing.sources:
        for slot in range(pairing.slots):
            other = pairing.reference_item(item, slot)
            similarity[item, slot], index[item, slot] = match_pair(
                x[item].to(dtype), reference[other].to(dtype), reference_mask[other], matching
            )
    return similarity, index


def guide(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    alpha: Tensor,
    threshold: Tensor,
    reference_mask: Tensor | None,
    source_mask: Tensor | None,
    matching: str,
    combine: str,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write `x`, pushed away from its matches, to `out`; return similarity and pushed indices."""
    dtype = compute_dtype(x.dtype)
    tokens = reference.shape[1]
    alpha = per_slot(alpha, x, pairing.slots)
    threshold = per_slot(threshold, x, pairing.slots)
    similarity, index = match(x, reference, pairing, reference_mask, matching)
    pushed = (similarity > threshold[:, None]) & (index >= 0)
    if source_mask is not None:
        pushed &= source_mask[:, None]
    if combine == "nearest" and pairing.slots > 0:
        pushed &= F.one_hot(similarity.argmax(dim=1), pairing.slots).bool().movedim(-1, 1)

    result = x.clone()
    for item in pairing.sources:
        original = x[item].to(dtype)
        moved = original.clone()
        for slot in range(pairing.slots):
            chosen = reference[pairing.reference_item(item, slot)].to(dtype)[index[item, slot]]
            step = alpha[slot] * (original - chosen)
            moved += torch.where(pushed[item, slot, :, None], step, 0.0)
        result[item] = torch.where(pushed[item].any(0)[:, None], moved.to(x.dtype), x[item])
    out.copy_(result)

    slots = torch.arange(pairing.slots, device=x.device)[:, None]
    moved_to = torch.where(pushed, slots * tokens + index, -1)
    if combine == "nearest" and pairing.slots > 0:
        return similarity.amax(dim=1, keepdim=True), moved_to.amax(dim=1, keepdim=True)
    return similarity, moved_to
