"""Checks a result against fp64 on the very tensors that are timed.

A chosen token must be the best in fp64, or its cosine in fp64 within rounding of the best. The
output must be the push away from that token, rounded once. Reference items must come back with the
same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compared.baselines import ALPHA, THRESHOLD
from ..compared.shapes import Shape

COSINE_TOLERANCE = 1e-5
"""Rounding of an fp32 dot product of unit vectors, with room for a long sum."""
ROWS = 256


class WrongResult(Exception):
    """A result that the definition does not allow."""


def check(
    shape: Shape,
    x: Tensor,
    function: Callable[[Tensor], Tensor] | None = None,
    rows: int = ROWS,
    seed: int = 0,
    matches: bool = True,
) -> dict[str, float | int]:
    """Compare results for random tokens of every source item with fp64.

    Args:
        function: computes the result; default: the operator. The matches of another function are
            unknown, so tokens with two equally good matches, up to rounding, are not judged.
        rows: tokens to check in each item.
        seed: chooses these tokens.
        matches: also call `match_tokens`, which tells the matches of tokens that are not pushed;
            has no effect with `shape.others`.

    Returns:
        Number of checked tokens, the share of them pushed, and the largest distance in cosine
        between a chosen token and the best.

    Raises:
        WrongResult: a result is wrong; the message names the item.
    """
    y, index = (function(x), None) if function else _operator(shape, x, matches)
    size = shape.items // shape.groups
    generator = torch.Generator().manual_seed(seed)
    checked, pushed, gap = 0, 0, 0.0
    for item in range(shape.items):
        start = item - item % size
        if item == start and not shape.others:
            if not torch.equal(y[item], x[item]):
                raise WrongResult(f"{shape}: reference item {item} was changed")
            continue
        reference = x[start]
        if shape.others:
            reference = torch.cat((x[start:item], x[item + 1 : start + size])).flatten(0, 1)
        chosen = torch.randperm(shape.tokens, generator=generator)[:rows].to(x.device)
        item_pushed, item_gap = _check_rows(
            f"{shape}: item {item}",
            x[item, chosen].double(),
            reference,
            y[item, chosen],
            None if index is None else index[item, chosen],
            every=matches and not shape.others,
        )
        checked, pushed, gap = checked + len(chosen), pushed + item_pushed, max(gap, item_gap)
    return {"checked": checked, "pushed_share": pushed / checked, "cosine_gap": gap}


def _operator(shape: Shape, x: Tensor, matches: bool) -> tuple[Tensor, Tensor]:
    """Result of the operator, and the tokens that it chose, (B, N); -1 if unknown."""
    from negtome_fast import functional

    arguments: dict[str, Any] = {"alpha": ALPHA, "threshold": THRESHOLD, "groups": shape.groups}
    if matches and not shape.others:
        y = functional.negtome(x, **arguments)
        _, chosen = functional.match_tokens(x, groups=shape.groups)
        return y, chosen.reshape(shape.items, -1, shape.tokens)[:, 0]
    reference: Literal["first", "others"] = "others" if shape.others else "first"
    y, _, pushed = functional.guide_tokens(x, reference, **arguments)
    return y, pushed[:, 0]


def _two_best(source: Tensor, reference: Tensor, block: int = 8192) -> tuple[Tensor, Tensor]:
    """The two best fp64 cosines (rows, 2), and the index of the best (rows,).

    The reference is taken in blocks, so that long inputs fit into memory.
    """
    unit = F.normalize(source, dim=-1)
    values, indices = [], []
    for start in range(0, len(reference), block):
        part = F.normalize(reference[start : start + block].double(), dim=-1)
        value, index = (unit @ part.T).topk(min(2, len(part)), dim=1)
        values.append(value)
        indices.append(index + start)
    found = torch.cat(values, dim=1)
    best, place = found.topk(min(2, found.shape[1]), dim=1)
    index = torch.cat(indices, dim=1).gather(1, place[:, :1])[:, 0]
    return (best if best.shape[1] == 2 else F.pad(best, (0, 1), value=-torch.inf)), index


def _check_rows(
    where: str,
    source: Tensor,
    reference: Tensor,
    result: Tensor,
    index: Tensor | None,
    every: bool,
) -> tuple[int, float]:
    """Return the number of pushed rows and the largest gap in cosine; raise WrongResult.

    With `every`, rows that are not pushed must have an index too.
    """
    best, best_index = _two_best(source, reference)
    judged = torch.ones(len(source), dtype=torch.bool, device=source.device)
    if index is None:
        index, judged = best_index, best[:, 0] - best[:, 1] > COSINE_TOLERANCE
    elif not every:
        index = torch.where(index < 0, best_index, index)
    if bool(((index < 0) | (index >= len(reference))).any()):
        raise WrongResult(f"{where}: matched no token, or one that is not there")
    matched = reference[index].double()
    cosine = F.cosine_similarity(source, matched, dim=-1)
    gap = float((best[:, 0] - cosine).max())
    if gap > COSINE_TOLERANCE:
        raise WrongResult(f"{where}: a match is {gap:.1e} in cosine from the best")

    expected = torch.where(
        (cosine > THRESHOLD)[:, None], source + ALPHA * (source - matched), source
    )
    judged &= (cosine - THRESHOLD).abs() > COSINE_TOLERANCE
    # fp32 arithmetic, then one rounding to the dtype of the tokens.
    resolution = max(torch.finfo(result.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    scale = source.abs() + matched.abs()
    far = ~((result.double() - expected).abs() <= resolution * (expected.abs() + scale))
    wrong = far.any(dim=1) & judged
    if bool(wrong.any()):
        raise WrongResult(f"{where}: {int(wrong.sum())} of {len(index)} tokens are wrong")
    return int((cosine > THRESHOLD).sum()), gap
