"""`select_nearest`: exact nearest points, in chunks, without a table of all similarities."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Metric = Literal["l2", "cosine"]
CHUNK = 1 << 22
"""Elements of the points that are held in fp32 at once."""
SPARE = 8
"""Candidates beyond `count` that are scored again without cancellation."""


@torch.no_grad()
def select_nearest(
    latents: Tensor,
    points: Tensor,
    count: int = 1,
    *,
    metric: Metric = "l2",
    search: Literal["torch", "faiss"] = "torch",
) -> tuple[Tensor, Tensor]:
    """Find the `count` nearest points of every item.

    Args:
        latents: `(B, ...)`; an item is one vector of all its numbers.
        points: `(K, ...)`, of the same item shape and device; any floating dtype.
        count: number of points, 1 to K.
        metric: `"l2"`, or `"cosine"` similarity.
        search: `"torch"`, or `"faiss"` (extra `faiss`, on the CPU); both are exact.

    Returns:
        score: `(B, count)` fp32; L2 distances ascend, cosines descend.
        index: `(B, count)` int64, rows of `points`; equal scores are ordered by row.

    Raises:
        ValueError: shapes that do not fit, an unknown metric or search.
        ImportError: faiss is not installed; names the extra.
    """
    if metric not in ("l2", "cosine"):
        raise ValueError(f'metric must be "l2" or "cosine", got {metric!r}')
    if search not in ("torch", "faiss"):
        raise ValueError(f'search must be "torch" or "faiss", got {search!r}')
    for name, tensor in (("latents", latents), ("points", points)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() < 2 or 0 in tensor.shape[1:] or (name == "points" and not len(tensor)):
            raise ValueError(f"{name} must be (K, ...) and not empty, got {tuple(tensor.shape)}")
    if latents.shape[1:] != points.shape[1:]:
        raise ValueError(
            f"points {tuple(points.shape)} are not of the shape of the items {tuple(latents.shape)}"
        )
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(points):
        raise ValueError(f"count must be 1 to {len(points)}, the number of points, got {count!r}")
    query, bank = latents.flatten(1).float(), points.flatten(1)
    if metric == "cosine":
        query = F.normalize(query, dim=-1)
    wanted = min(count + SPARE, len(points))
    find = {"torch": _search_chunks, "faiss": _search_faiss}[search]
    candidates = find(query, bank, wanted, metric)
    # Ascending rows, so that a stable sort puts the lower of two equals first.
    candidates = candidates.sort(dim=1).values
    found = bank[candidates].float()
    if metric == "cosine":
        score = (F.normalize(found, dim=-1) * query[:, None]).sum(dim=-1)
    else:
        score = (found - query[:, None]).norm(dim=-1)
    order = score.sort(dim=1, descending=metric == "cosine", stable=True).indices[:, :count]
    return score.gather(1, order), candidates.gather(1, order)


def _search_chunks(query: Tensor, bank: Tensor, count: int, metric: Metric) -> Tensor:
    """Rows of the `count` best candidates, `(B, count)`."""
    best = query.new_full((len(query), 0), torch.inf)
    rows = torch.empty((len(query), 0), dtype=torch.int64, device=query.device)
    start = 0
    for part in bank.split(max(count, CHUNK // bank.shape[1], 1)):
        wide = part.float()
        if metric == "cosine":
            cost = -(query @ F.normalize(wide, dim=-1).T)
        else:
            cost = wide.square().sum(dim=1) - 2 * (query @ wide.T)
        cost = torch.cat([best, cost], dim=1)
        number = torch.arange(start, start + len(part), device=query.device)
        every = torch.cat([rows, number.expand(len(query), -1)], dim=1)
        best, place = cost.topk(min(count, cost.shape[1]), dim=1, largest=False)
        rows, start = every.gather(1, place), start + len(part)
    return rows


def _search_faiss(query: Tensor, bank: Tensor, count: int, metric: Metric) -> Tensor:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "search='faiss' needs the extra 'faiss': pip install 'negtome-fast[faiss]'"
        ) from error
    flat = faiss.IndexFlatIP if metric == "cosine" else faiss.IndexFlatL2
    index = flat(bank.shape[1])
    for part in bank.split(max(1, CHUNK // bank.shape[1])):
        wide = part.float()
        index.add((F.normalize(wide, dim=-1) if metric == "cosine" else wide).cpu().numpy())
    rows = index.search(query.cpu().numpy(), count)[1]
    # faiss returns -1 for an item that is not finite; its scores are NaN with any point.
    return torch.from_numpy(rows).clamp_min(0).to(query.device)
