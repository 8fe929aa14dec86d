"""Constants of a pairing for `small`: rows, offsets and results that no call changes."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..naive import NOTHING
from ..pairing import Pairing


class Places(NamedTuple):
    """Constants of a pairing: P items move, and each of them meets S references.

    Attributes:
        moving: int64 `(P,)`, the items that move.
        own: int64 `(P, 1, N)`, the row of each moving token among those of the batch.
        starts: int64 `(P, S, N)`, the row of the reference's first token among all reference
            tokens, the same for all N; None if it is `S * length`.
        items: int64 `(P, S)`, number of the reference item.
        offsets: int64 `(S, 1)`, slot times the length of a reference.
        order: int64 `(P * S)`, positions of the results of `small._both_ways`; None except for
            `others`.
        one, other: int64, the two items of each of its products.
        length: number of tokens of a reference.
        nothing, stays: fp32 and int64 `(G, 1, N)`, -inf and -1: the results of items that do not
            move.
        none: -1, `()`.
    """

    moving: Tensor
    own: Tensor
    starts: Tensor | None
    items: Tensor
    offsets: Tensor
    order: Tensor | None
    one: Tensor
    other: Tensor
    length: int
    nothing: Tensor
    stays: Tensor
    none: Tensor


@lru_cache(maxsize=64)
def places_of(pairing: Pairing, matching: str, tokens: int, length: int) -> Places:
    """Constants of this pairing, for `tokens` source tokens and references of `length`."""
    items = [
        [pairing.reference_item(item, slot) for slot in range(pairing.slots)]
        for item in pairing.sources
    ]
    in_batch = pairing.mode != "external"
    # Shared: the references of all items begin at row 0 of the table of reference tokens.
    shared = pairing.groups == 1 if pairing.mode == "first" else not (in_batch or pairing.per_item)
    first, second, order = [], [], []
    if pairing.mode == "others":
        pairs = [(s, o) for s, row in zip(pairing.sources, items, strict=True) for o in row]
        products = [pair for pair in pairs if pair[0] < pair[1]]
        first, second = [one for one, _ in products], [other for _, other in products]
        number = {pair: place for place, pair in enumerate(products)}
        number |= {(b, a): place + len(products) for (a, b), place in number.items()}
        # The rows of a product are the source's tokens, or the reference's with "official".
        order = [number[(s, o) if matching == "paper" else (o, s)] for s, o in pairs]

    def constant(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device="cpu")

    with torch.inference_mode(False):
        numbers, still = constant(items), (pairing.groups, 1, tokens)
        moving = constant(pairing.sources)
        return Places(
            moving,
            moving[:, None, None] * tokens + torch.arange(tokens, device="cpu"),
            None if shared else (numbers * length)[..., None].expand(-1, -1, tokens),
            numbers,
            torch.arange(pairing.slots, device="cpu")[:, None] * length,
            constant(order) if order else None,
            constant(first),
            constant(second),
            length,
            torch.full(still, NOTHING, dtype=torch.float32, device="cpu"),
            torch.full(still, -1, dtype=torch.int64, device="cpu"),
            constant(-1),
        )
