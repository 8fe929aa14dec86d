"""`NegToMe`: the operator as a layer without parameters."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import ReferenceTokens
from .functional import negtome


class NegToMe(nn.Module):
    """Push tokens away from their most similar reference tokens; see `negtome_fast.negtome`.

    `alpha` and `threshold` are kept as fp32 buffers outside the state dict, so that assigning a new
    number never recompiles a compiled caller and `half()` does not round them.

    Args:
        alpha, threshold, reference, matching, groups, combine, dropout, inplace, backend:
            as in `negtome`. `reference` is the default of calls without one.
    """

    alpha: Tensor
    threshold: Tensor

    def __init__(
        self,
        alpha: float = 0.9,
        threshold: float = 0.65,
        reference: str = "first",
        matching: str = "paper",
        groups: int = 1,
        combine: str = "nearest",
        dropout: float = 0.0,
        inplace: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name in ("alpha", "threshold"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32), persistent=False)
        self.alpha, self.threshold = alpha, threshold  # type: ignore[assignment]
        self.reference = reference
        self.matching = matching
        self.groups = groups
        self.combine = combine
        self.dropout = dropout
        self.inplace = inplace
        self.backend = backend

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("alpha", "threshold") and not isinstance(value, Tensor):
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
            limit: Any = torch.finfo(torch.float32).max
            if not -limit <= value <= limit:
                raise ValueError(f"{name} must be finite in fp32, got {_shown(value)}")
            self._buffers[name].fill_(float(value))  # type: ignore[union-attr]
            return
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NegToMe:
        # `module.half()` would round alpha: the buffers follow the device only.
        values = {name: self._buffers[name] for name in ("alpha", "threshold")}
        super()._apply(fn, recurse)
        for name, value in values.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self

    def forward(
        self,
        x: Tensor,
        reference: ReferenceTokens | None = None,
        reference_mask: Tensor | None = None,
        source_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Push tokens `(B, N, D)`; returns `(B, N, D)`. Arguments are those of `negtome`."""
        return negtome(
            x,
            self.reference if reference is None else reference,  # type: ignore[arg-type]
            alpha=self.alpha,
            threshold=self.threshold,
            reference_mask=reference_mask,
            matching=self.matching,
            groups=self.groups,
            combine=self.combine,
            source_mask=source_mask,
            dropout=self.dropout,
            generator=generator,
            inplace=self.inplace,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"alpha={_shown(self.alpha)}, threshold={_shown(self.threshold)}, "
            f"reference={self.reference!r}, matching={self.matching!r}, groups={self.groups}, "
            f"combine={self.combine!r}, dropout={_shown(self.dropout)}, backend={self.backend!r}"
        )


def _shown(value: Any) -> str:
    """Return a number in short, and anything else by its kind: it may be wrong and still shown."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_meta):
        return f"tensor {tuple(value.shape)}"
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError, OverflowError):
        return f"{type(value).__name__}"
