"""`Call`: everything that a backend needs to know about one call of the operator.

`functional` makes it, `ops` hands it on, and each backend has `match(call)` and `guide(call, out)`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .pairing import Pairing


class Call(NamedTuple):
    """The checked arguments of one call.

    With P reference items of M tokens, each source item meets C of them, in slots.

    Attributes:
        x: source tokens `(B, N, D)`, any strides.
        reference: reference tokens `(P, M, D)`, any strides; `x` itself unless `pairing.mode` is
            `"external"`.
        pairing: which source item meets which reference item.
        reference_mask: bool `(P, M)`, True where a reference token may be matched, or None.
        matching: `"paper"` or `"official"`.
        alpha, threshold: floating point, `()` or `(C,)`, on any device. `match` reads neither these
            nor what follows.
        source_mask: bool `(B, N)`, True where a source token may move, or None.
        combine: `"nearest"` or `"sum"`.
    """

    x: Tensor
    reference: Tensor
    pairing: Pairing
    reference_mask: Tensor | None = None
    matching: str = "paper"
    alpha: Tensor = None  # type: ignore[assignment]
    threshold: Tensor = None  # type: ignore[assignment]
    source_mask: Tensor | None = None
    combine: str = "nearest"
