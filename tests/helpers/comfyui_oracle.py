"""An oracle for what a guide is given: it changes the latents, and reads no list of places.

Attentions are observed where a model computes them, and compared with what `Guidance.apply` is
handed. The models must be such that an attention's output at a token depends on that token alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from negtome_fast.guidance import Guidance


@dataclass
class Handed:
    """One call of `Guidance.apply`: its tokens (B, N, D), and their (height, width)."""

    block: str
    tokens: torch.Tensor
    grid: tuple[int, int]


@contextmanager
def handed() -> Iterator[list[Handed]]:
    """Collects the calls of `Guidance.apply` in the runs inside."""
    calls: list[Handed] = []
    original = Guidance.apply

    def apply(self: Guidance, tokens: torch.Tensor, **given: Any) -> torch.Tensor:
        step = self._step
        assert step is not None
        grid = given.get("grid") or step.grid
        assert grid is not None
        calls.append(Handed(given["block"], tokens.clone(), grid))
        return original(self, tokens, **given)

    with mock.patch.object(Guidance, "apply", apply):
        yield calls


def moved(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns for each pair of tokens (B, S, D) which tokens (B, S) differ."""
    return [(a != b).any(dim=-1) for a, b in zip(one, other, strict=True)]


def pixels(latents: torch.Tensor) -> Iterator[tuple[int, ...]]:
    """Yields some pixels: ([frame,] y, x)."""
    sizes = latents.shape[2:]
    yield tuple(0 for _ in sizes)
    yield tuple(size - 1 for size in sizes)
    yield tuple(size // 2 for size in sizes)
    yield (*(0 for _ in sizes[:-2]), sizes[-2] - 1, 1)


Run = Callable[[torch.Tensor], tuple[list[torch.Tensor], list[Handed]]]
"""Noise (B, C, ...) -> the outputs of all attentions (P * B, S, D), and what was handed over, in
the first forward of a run whose batch has P parts."""


def check_tokens(run: Run, noise: torch.Tensor) -> None:
    """Changes pixels of the latents, and compares the tokens that move with those handed over.

    Raises:
        AssertionError: an attention of the image is not handed over, or other tokens are.
    """
    attended, calls = run(noise)
    parts = len(attended[0]) // len(noise)
    for item in range(len(noise)):
        other = noise.clone()
        other[item] += 1.0
        attended_now, calls_now = run(other)
        images = [rows for rows in moved(attended, attended_now) if rows.any()]
        tokens = moved([one.tokens for one in calls], [one.tokens for one in calls_now])
        assert len(images) == len(tokens), "an attention of the image is not guided"
        own = torch.zeros(len(noise) * parts, dtype=torch.bool)
        own[item :: len(noise)] = True
        for one, image, rows in zip(calls, images, tokens, strict=True):
            assert rows.shape[0] == len(own), one.block
            assert image.sum() == rows.sum() == parts * rows.shape[1], one.block
            assert torch.equal(rows.all(dim=1), own) and torch.equal(rows.any(dim=1), own)
    for pixel in pixels(noise):
        other = noise.clone()
        other[(0, slice(None), *pixel)] += 1.0
        for one, now in zip(calls, run(other)[1], strict=True):
            (rows,) = moved([one.tokens], [now.tokens])
            assert rows.nonzero().tolist() == [
                [part * len(noise), _token(pixel, noise.shape, one.grid)] for part in range(parts)
            ], one.block


def _token(pixel: tuple[int, ...], shape: Sequence[int], grid: tuple[int, int]) -> int:
    """Returns the number of the token that holds a pixel."""
    (*frame, y, x), (height, width) = pixel, shape[-2:]
    row, column = y * grid[0] // height, x * grid[1] // width
    return ((frame[0] if frame else 0) * grid[0] + row) * grid[1] + column
