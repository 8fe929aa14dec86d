"""The authors' function, with their name and arguments.

The result is theirs up to fp32 rounding, but no N x N matrix is made. Numbers that they round to
infinity become the largest finite number of the dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_tokens
from ..functional import negtome as _negtome
from ..naive import Saturated, is_finite


def negtome(
    hidden_states_orig: Tensor,
    alpha: float = 0.5,
    threshold: float = 0.7,
    dropout: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Computes the authors' `negtome`: `matching="official"` with frame 0 as the reference.

    Args:
        hidden_states_orig: `(frames, N, D)`; frame 0 is the reference of all frames, also of
            itself, as in their code (its tokens match themselves).
        alpha: push strength; their default is 0.5 here, 0.9 in their pipelines.
        threshold: cosine similarity that a match must exceed; their default is 0.7.
        dropout: probability, 0 to 1, that a token is spared, drawn by torch's global generator.
        mask: `(frames * N, N)`, or `(N, N)` for all frames, non-zero where source token `i` (row)
            may be matched with reference token `j` (column). If all rows of a frame are equal, as
            in their pipelines, it says which positions `j` may move. The check waits for the
            device; any other mask is computed in chunks.

    Returns:
        `(frames, N, D)`, dtype of the input.

    Raises:
        ValueError, TypeError: the mask has another shape; otherwise as `negtome_fast.negtome`.
    """
    check_tokens(hidden_states_orig)
    frames, tokens, _ = hidden_states_orig.shape
    gate = None
    if mask is not None:
        if mask.numel() not in (frames * tokens**2, tokens**2) or mask.shape[-1] != tokens:
            raise ValueError(
                f"mask must be (frames * N, N) = {(frames * tokens, tokens)} or {(tokens,) * 2}, "
                f"got {tuple(mask.shape)}"
            )
        pairs = mask.reshape(-1, tokens, tokens).to(torch.bool)
        gate = pairs[:, 0]
        if not torch.equal(pairs, gate[:, None].expand_as(pairs)):
            allowed = pairs.expand(frames, -1, -1)
            return _with_pair_mask(hidden_states_orig, alpha, threshold, dropout, allowed)
    return _negtome(
        hidden_states_orig,
        hidden_states_orig[0],
        alpha=alpha,
        threshold=threshold,
        matching="official",
        source_mask=gate,
        dropout=dropout,
    )


def _with_pair_mask(
    x: Tensor, alpha: float, threshold: float, dropout: float, pairs: Tensor, chunk: int = 512
) -> Tensor:
    """Computes the definition with a mask of pairs `(frames, N, N)`, in chunks of tokens."""
    # Only to check the arguments.
    _negtome(x[:0], alpha=alpha, threshold=threshold, dropout=dropout)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit, reference, finite = F.normalize(wide, dim=-1), wide[0], is_finite(wide)
    best = torch.full(x.shape[:2], -torch.inf, dtype=wide.dtype, device=x.device)
    index = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    for frame in range(x.shape[0]):
        for start in range(0, x.shape[1], chunk):
            part = slice(start, start + chunk)
            similarity = unit[frame] @ unit[0, part].T
            allowed = pairs[frame, :, part] & finite[frame, :, None] & finite[0, part]
            similarity.masked_fill_(~allowed, -torch.inf)
            best[frame, part], index[frame, part] = similarity.max(dim=0)
    moves = (best > threshold) & finite & finite[0, index]
    if dropout > 0.0:
        moves &= torch.rand(moves.shape, device=x.device) > dropout
    moved = Saturated.apply(wide + alpha * (wide - reference[index]), x.dtype)
    return torch.where(moves[..., None], moved, x)
