"""The definition that the authors' function must agree with."""

from __future__ import annotations

import torch


def authors_definition(
    x: torch.Tensor, alpha: float, threshold: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """From the definition, in fp64: every pair, maximum over the source axis, gather, push."""
    x = x.double()
    frames, count, _ = x.shape
    unit = x / x.norm(dim=-1, keepdim=True)
    similarity = torch.einsum("fid,jd->fij", unit, unit[0])
    if mask is not None:
        similarity[~mask.view(frames, count, count).bool()] = -torch.inf
    best, at = similarity.max(dim=1)
    r = x[0][at]
    return torch.where((best > threshold)[..., None], (1 + alpha) * x - alpha * r, x)
