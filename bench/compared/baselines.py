"""Baselines of the operator, written from the definitions.

authors   the whole cosine matrix (F, N, N) against frame 0, its maximum over the *source* axis, a
          gather, and (1 + alpha) x - alpha r where the maximum exceeds the threshold
split     the paper's matching, exact, by library calls: a product that fills a bounded matrix of
          scores, a reduction over it, and the push
matmul    the bare product of the source tokens with their reference, with its output stored: the
          same multiply-adds and nothing else
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHA = 0.9
THRESHOLD = 0.65
EPSILON = 1e-12


def authors_frames(frames: Tensor, alpha: float = ALPHA, threshold: float = THRESHOLD) -> Tensor:
    """The computation of the method's authors on `frames` `(F, N, D)`; frame 0 is the reference.

    Like theirs, it stores the matrix, computes frame 0 against itself, and rounds to the input's
    dtype after every operation. Unlike theirs, it does not repeat the reference for each frame
    before it gathers, and indexes only on the device. If anything, it is faster than theirs.
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


def split_rows_of(
    sources: Tensor, reference: Tensor, targets: Tensor, alpha: float, threshold: float, rows: int
) -> None:
    """The paper's matching of `sources` `(S, D)` in `reference` `(M, D)`, `rows` scores at a time.

    Writes `targets` `(S, D)`. Scores are fp32, so that choices are as exact as the operator's. A
    GPU's library multiplies half-precision tokens into fp32; a CPU's cannot, so tokens are cast.
    """
    wide = torch.promote_types(sources.dtype, torch.float32)
    norm = torch.linalg.vector_norm(reference, dim=-1, dtype=wide).clamp_min(EPSILON)
    mixed = sources.is_cuda and sources.dtype != wide
    columns = reference.T if mixed else (reference.to(wide) / norm[:, None]).T
    for start in range(0, len(sources), rows):
        chunk = sources[start : start + rows]
        if mixed:
            scores = torch.mm(chunk, columns, out_dtype=wide) / norm
        else:
            scores = torch.mm(chunk.to(wide), columns)
        best, index = scores.max(dim=1)
        own = torch.linalg.vector_norm(chunk, dim=-1, dtype=wide).clamp_min(EPSILON)
        source, matched = chunk.to(wide), reference[index].to(wide)
        moved = (source + alpha * (source - matched)).to(sources.dtype)
        targets[start : start + rows] = torch.where((best > threshold * own)[:, None], moved, chunk)


def split_frames(frames: Tensor, out: Tensor, alpha: float, threshold: float, rows: int) -> Tensor:
    """`split_rows_of` for `frames` `(F, N, D)` with frame 0, which is copied."""
    out[0].copy_(frames[0])
    targets = out[1:].view(-1, frames.shape[-1])
    split_rows_of(frames[1:].flatten(0, 1), frames[0], targets, alpha, threshold, rows)
    return out


def split_others(
    x: Tensor,
    groups: int = 1,
    alpha: float = ALPHA,
    threshold: float = THRESHOLD,
    rows: int = 2048,
) -> Tensor:
    """`split_rows_of` for every item of `x` `(B, N, D)` with all others of its group."""
    y = torch.empty_like(x)
    for part, out in zip(x.chunk(groups), y.chunk(groups), strict=True):
        for item in range(len(part)):
            others = torch.cat((part[:item], part[item + 1 :])).flatten(0, 1)
            split_rows_of(part[item], others, out[item], alpha, threshold, rows)
    return y


def split(
    x: Tensor,
    groups: int = 1,
    alpha: float = ALPHA,
    threshold: float = THRESHOLD,
    rows: int = 2048,
) -> Tensor:
    """`split_frames` on each of the equal `groups` of contiguous `x` `(B, N, D)`."""
    y = torch.empty_like(x)
    for part, out in zip(x.chunk(groups), y.chunk(groups), strict=True):
        split_frames(part, out, alpha, threshold, rows)
    return y


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
    """`matmul` into memory that exists, so that no time goes into mapping pages."""
    source, reference = matmul_operands(x, groups)
    if groups == 1:
        torch.mm(source[0], reference[0], out=out[0])
        return out
    return torch.bmm(source, reference, out=out)


def matmul_others(x: Tensor, groups: int = 1) -> list[Tensor]:
    """The bare products of every item with all others of its group, each newly allocated.

    Four items need twelve products. A library does not know that one serves both directions.
    """
    products = []
    for part in x.chunk(groups):
        for item in range(len(part)):
            for others in (part[:item], part[item + 1 :]):
                if len(others):
                    products.append(torch.mm(part[item], others.flatten(0, 1).T))
    return products
