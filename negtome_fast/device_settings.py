"""`DeviceSettings`: settings of a guidance as tensors on the device of the tokens, made once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import mark_checked
from .config import Grid, NegToMeConfig, ReferenceSettings
from .masks import masks_on_grid


class DeviceSettings:
    """Strengths, thresholds and masks of a configuration and its references.

    Args:
        config: the configuration.
        references: the references from outside of the batch.

    Attributes:
        alphas, thresholds: one for each reference; one if there are none.
    """

    def __init__(self, config: NegToMeConfig, references: Sequence[ReferenceSettings]) -> None:
        self._config = config
        self._references = tuple(references)
        self.alphas = self._setting("alpha")
        self.thresholds = self._setting("threshold")
        self._scalars: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, Grid, torch.device], Tensor] = {}

    def _setting(self, name: str) -> tuple[float, ...]:
        default = getattr(self._config, name)
        if not self._references:
            return (default,)
        given = [getattr(reference, name) for reference in self._references]
        return tuple(default if value is None else value for value in given)

    def scalars_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns alpha and threshold: (), or (R,) where they differ between references."""
        if device not in self._scalars:
            with torch.inference_mode(False):
                alpha, threshold = (
                    mark_checked(
                        torch.tensor(
                            v[0] if len(set(v)) == 1 else v, dtype=torch.float32, device=device
                        )
                    )
                    for v in (self.alphas, self.thresholds)
                )
            self._scalars[device] = (alpha, threshold)
        return self._scalars[device]

    def moved(self, pushed: Tensor, tokens: int) -> Tensor:
        """Returns `pushed` with -1 also where the reference has an alpha of 0.

        Args:
            pushed: (B, S, N) as `guide_tokens` returns it.
            tokens: number of tokens of a reference.
        """
        if all(self.alphas):
            return pushed
        if not any(self.alphas):
            return torch.full_like(pushed, -1)
        strong = self.scalars_on(pushed.device)[0] != 0
        return torch.where(strong[pushed.clamp_min(0) // tokens], pushed, -1)

    def reference_masks_on(
        self, references: Tensor, block: str, grid: Grid | None
    ) -> Tensor | None:
        """Returns the masks (R, M) of the references' tokens; None if no reference has one.

        Args:
            references: the references' tokens (..., M, D).
            block: name of the block, for errors.
            grid: (height, width) of its tokens, where known.

        Raises:
            ValueError: the grid is not known, or a mask leaves no token of it.
        """
        masks = [reference.mask for reference in self._references]
        if all(mask is None for mask in masks):
            return None
        tokens = references.shape[-2]
        if grid is None or tokens % (grid[0] * grid[1]):
            raise ValueError(
                f"a reference has a mask, but the token grid of {block} is not known; pass "
                "grid=(height, width), or use references without masks"
            )
        key = (tokens, grid, references.device)
        if key not in self._masks:
            with torch.inference_mode(False):
                on_grid = masks_on_grid(masks, tokens // (grid[0] * grid[1]), grid, block)
                self._masks[key] = on_grid.to(references.device)
        return self._masks[key]
