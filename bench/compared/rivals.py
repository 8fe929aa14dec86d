"""Fused nearest-centre assignments of other packages, if they are installed.

Among unit vectors the nearest centre is the one with the best cosine, so the assignment step of a
k-means library is a matching; torch normalises, compares with the threshold and pushes. Normalised
tokens are rounded to their dtype, as a user of these packages would do it, so the matches are
not exact.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .baselines import ALPHA, THRESHOLD

Assign = Callable[[Tensor, Tensor], Tensor]
ASSIGNMENTS = {
    "flash-kmeans": ("flash_kmeans.assign_euclid_triton", "euclid_assign_triton"),
    "flashlib": ("flashlib.primitives.kmeans", "euclid_assign_triton"),
}
"""Package -> (module, function)."""


class NotInstalled(Exception):
    """The package of a rival is missing; the message names it."""


def assignment(package: str) -> Assign:
    """`(sources (B, N, D), centres (B, K, D)) -> (B, N) int32`, the nearest centre of each source.

    Raises:
        NotInstalled: the package or its function is missing.
    """
    module, name = ASSIGNMENTS[package]
    try:
        function: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise NotInstalled(
            f"{package} is not installed ({type(error).__name__}: {error})"
        ) from None
    if package == "flashlib":
        return lambda sources, centres: function(sources, centres, c_sq=squares(centres))
    return lambda sources, centres: function(
        sources, centres, squares(sources), c_sq=squares(centres)
    )


def squares(tokens: Tensor) -> Tensor:
    """Squared norms `(B, N)` in fp32."""
    norm = torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32)
    return norm * norm


def operands(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Views `(G, (S - 1) N, D)` of all sources and `(G, N, D)` of the references of the groups."""
    items, tokens, channels = x.shape
    grouped = x.view(groups, items // groups * tokens, channels)
    return grouped[:, tokens:], grouped[:, :tokens]


def negtome_by(
    assign: Assign, x: Tensor, groups: int, alpha: float = ALPHA, threshold: float = THRESHOLD
) -> Tensor:
    """The operator in mode "first" on contiguous `x` `(B, N, D)`, matched by `assign`."""
    sources, references = operands(x, groups)
    unit_sources, unit_references = F.normalize(sources, dim=-1), F.normalize(references, dim=-1)
    index = assign(unit_sources, unit_references).long()[..., None]
    width = x.shape[-1]
    best = unit_references.gather(1, index.expand(-1, -1, width))
    cosine = torch.linalg.vecdot(unit_sources.float(), best.float())
    matched = references.gather(1, index.expand(-1, -1, width))
    moved = (sources.float() + alpha * (sources.float() - matched.float())).to(x.dtype)
    y = x.clone()
    targets, _ = operands(y, groups)
    targets.copy_(torch.where((cosine > threshold)[..., None], moved, sources))
    return y


def assigned(assign: Assign, x: Tensor, groups: int) -> Tensor:
    """The matching alone, without normalising, for the time of the fused kernel itself."""
    return assign(*operands(x, groups))
