"""What the operator is measured against, written from the definitions.

authors   the whole cosine matrix (F, N, N) against frame 0, the maximum over the *source*
          axis, a gather, and (1 + alpha) x - alpha r where the maximum exceeds the threshold
matmul    the bare product of the source tokens with their reference: the same multiply-adds,
          its output stored, nothing else
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHA = 0.9
THRESHOLD = 0.65


def authors_frames(frames: Tensor, alpha: float = ALPHA, threshold: float = THRESHOLD) -> Tensor:
    """The computation of the method's authors on `frames` `(F, N, D)`; frame 0 is the reference.

    As theirs, it stores the matrix, computes frame 0 against itself, and rounds to the input's
    dtype after every operation. It gathers without first repeating the reference for each frame,
    and indexes on the device only; so it is, if anything, faster than theirs.
    """
    unit = F.normalize(frames, dim=-1)
    similarity = unit @ unit[0].T
    best, index = similarity.max(dim=-2)
    matched = frames[0][index]
    return torch.where(
        (best > threshold)[..., None], (1 + alpha) * frames - alpha * matched, frames
    )


def authors(
    x: Tensor, groups: int = 1, alpha: float = ALPHA, threshold: float = THRESHOLD
) -> Tensor:
    """`authors_frames` on each of the equal `groups` of `x` `(B, N, D)`."""
    if groups == 1:
        return authors_frames(x, alpha, threshold)
    return torch.cat([authors_frames(part, alpha, threshold) for part in x.chunk(groups)])


def matmul_operands(x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Views `(G, (S - 1) * N, D)` and `(G, D, N)` whose product is the bare matching work."""
    items, tokens, channels = x.shape
    grouped = x.view(groups, items // groups * tokens, channels)
    return grouped[:, tokens:], grouped[:, :tokens].transpose(1, 2)


def matmul(x: Tensor, groups: int = 1) -> Tensor:
    """The bare matrix product, its output newly allocated: `(G, (S - 1) * N, N)`."""
    source, reference = matmul_operands(x, groups)
    if groups == 1:
        return torch.mm(source[0], reference[0])[None]
    return torch.bmm(source, reference)


def matmul_into(x: Tensor, out: Tensor, groups: int = 1) -> Tensor:
    """`matmul` into memory that is already there: no time goes into mapping pages."""
    source, reference = matmul_operands(x, groups)
    if groups == 1:
        torch.mm(source[0], reference[0], out=out[0])
        return out
    return torch.bmm(source, reference, out=out)
