"""Is the operator right on the very tensors it is timed on? Checked in fp64, by the index rule.

A chosen token must be the fp64 best, or its fp64 cosine within rounding of the best; the output
must be the push away from that token, rounded once; reference items must come back bit-identical.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .baselines import ALPHA, THRESHOLD
from .shapes import Shape

#: Rounding of an fp32 dot product of unit vectors, with room for a long sum.
COSINE_TOLERANCE = 1e-5
ROWS = 256


class WrongResult(Exception):
    """The operator returned something that the definition does not allow."""


def check(shape: Shape, x: Tensor, rows: int = ROWS, seed: int = 0) -> dict[str, float | int]:
    """Compare `rows` random tokens of every source item with fp64.

    Returns:
        How many tokens were checked, the share of them pushed, and how far the cosine of a chosen
        token was from the best at most.

    Raises:
        WrongResult: with the item and what is wrong with it.
    """
    from negtome_fast.functional import match_tokens, negtome

    y = negtome(x, alpha=ALPHA, threshold=THRESHOLD, groups=shape.groups)
    _, index = match_tokens(x, groups=shape.groups)
    index = index.reshape(shape.items, -1, shape.tokens)[:, 0]
    size = shape.items // shape.groups
    generator = torch.Generator().manual_seed(seed)
    checked, pushed, gap = 0, 0, 0.0
    for item in range(shape.items):
        if item % size == 0:
            if not torch.equal(y[item], x[item]):
                raise WrongResult(f"{shape}: reference item {item} was changed")
            continue
        chosen = torch.randperm(shape.tokens, generator=generator)[:rows].to(x.device)
        item_pushed, item_gap = _check_rows(
            f"{shape}: item {item}",
            x[item, chosen].double(),
            x[item - item % size],
            y[item, chosen],
            index[item, chosen],
        )
        checked, pushed, gap = checked + len(chosen), pushed + item_pushed, max(gap, item_gap)
    return {"checked": checked, "pushed_share": pushed / checked, "cosine_gap": gap}


def _best_cosine(source: Tensor, reference: Tensor, block: int = 8192) -> Tensor:
    """The fp64 best over reference tokens, a block at a time so that long inputs fit."""
    unit = F.normalize(source, dim=-1)
    parts = [
        (unit @ F.normalize(part.double(), dim=-1).T).amax(dim=1) for part in reference.split(block)
    ]
    return torch.stack(parts).amax(dim=0)


def _check_rows(
    where: str, source: Tensor, reference: Tensor, result: Tensor, index: Tensor
) -> tuple[int, float]:
    """Number of pushed rows and the largest gap in cosine; raises WrongResult."""
    if bool(((index < 0) | (index >= len(reference))).any()):
        raise WrongResult(f"{where}: matched no token, or one that is not there")
    matched = reference[index].double()
    cosine = F.cosine_similarity(source, matched, dim=-1)
    gap = float((_best_cosine(source, reference) - cosine).max())
    if gap > COSINE_TOLERANCE:
        raise WrongResult(f"{where}: a match is {gap:.1e} in cosine from the best")

    expected = torch.where(
        (cosine > THRESHOLD)[:, None], source + ALPHA * (source - matched), source
    )
    clear = (cosine - THRESHOLD).abs() > COSINE_TOLERANCE
    # fp32 arithmetic, then one rounding to the dtype of the tokens.
    resolution = max(torch.finfo(result.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    scale = source.abs() + matched.abs()
    wrong = ((result.double() - expected).abs() > resolution * (expected.abs() + scale)) & clear[
        :, None
    ]
    if bool(wrong.any()):
        raise WrongResult(f"{where}: {int(wrong.any(1).sum())} of {len(index)} tokens are wrong")
    return int((cosine > THRESHOLD).sum()), gap
