"""`guided_places` and `moved_places`: what is guided, and what a pixel of the noise moves.

A band of the noise is changed (a row or a column of the coarsest grid) in a model that
`local_models` made local. The tokens that then move in an attention output are those of the band.
What the guidance is handed is marked with numbers, which the output then shows. `disagreements`
compares the two. No layout is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from helpers.families import Family
from helpers.families.core import TEXT, Size, denoiser
from helpers.local_models import local_models
from negtome_fast.pipelines import NegToMeHandle, apply_negtome
from negtome_fast.pipelines.blocks import output_projection

SEED = 1000
"""Seed of the noise. Smaller seeds make what is given, such as the text."""
CAPTIONS = (TEXT, TEXT + 3)
"""Lengths of the captions of even and odd items, where they may differ."""
UNCHANGED = len(CAPTIONS)
"""Number of items at the beginning whose noise is not changed."""
MARK = 2.0**-4
"""Distance between the marks of two tokens that follow each other."""


@dataclass
class Seen:
    """Tokens of one guided block in a forward, before and after they were marked.

    Attributes:
        before: (items, tokens, channels), the attention's tokens before they were marked.
        after: the tokens with the marks.
        grid: (height, width) that the guidance was told.
    """

    before: Tensor = field(default_factory=lambda: torch.empty(0))
    after: Tensor = field(default_factory=lambda: torch.empty(0))
    grid: Size | None = None


def disagreements(
    family: Family,
    pipe: Any,
    *,
    model: nn.Module | None = None,
    grids: bool = False,
    **settings: Any,
) -> list[str]:
    """Return what is wrong with the guidance of a pipeline, one line for each block.

    Args:
        family: how the pipeline is run.
        model: the denoiser to look at; that of `denoiser` if None.
        grids: whether it is wrong if the guidance is not told the grid.
        settings: settings of the guidance, such as `placement`.
    """
    if "steps" not in settings:
        settings["t_end"] = 0
    size, written = next(iter(family.grids.items()))
    rows, columns = min(written)
    changed = [("row", row) for row in range(rows)] + [("column", c) for c in range(columns)]
    with local_models():
        seen = observe(
            family, pipe, model or denoiser(pipe), size, (rows, columns), changed, **settings
        )
    found = []
    for name, block in seen.items():
        wrong = check_block(block, (rows, columns), changed)
        if grids and block.grid is None:
            wrong = "the guidance is not told the grid"
        if wrong:
            found.append(f"{name}: {wrong}")
    return found


def observe(
    family: Family,
    pipe: Any,
    model: nn.Module,
    size: Size,
    grid: Size,
    changed: list[tuple[str, int]],
    **settings: Any,
) -> dict[str, Seen]:
    """Return what one guided forward shows: block -> `Seen`.

    The first `UNCHANGED` items have the same noise. Of each further pair, one for each length of
    the captions, both have the same change of it.
    """
    items = UNCHANGED * (1 + len(changed))
    captions = CAPTIONS if family.several_captions else (TEXT, TEXT)
    seen: dict[str, Seen] = {}
    with ExitStack() as stack:
        handle = apply_negtome(pipe, **settings)
        stack.callback(handle.remove)
        handle.remove()
        for name in handle.blocks:
            seen[name] = Seen()
            stack.enter_context(recorded(model, name, "before", seen[name], settings))
        handle = apply_negtome(pipe, **settings)
        stack.callback(handle.remove)
        for name in handle.blocks:
            stack.enter_context(recorded(model, name, "after", seen[name], settings))
        stack.enter_context(marked(handle, seen))
        stack.enter_context(changed_noise(grid, changed))
        with torch.no_grad():
            family.generate(
                pipe, items, size=size, steps=1, captions=captions * (items // 2), seed=SEED
            )
    for block in (block for block in seen.values() if len(block.after)):
        block.before = block.before.reshape(items, -1, block.before.shape[-1])
        block.after = block.after.reshape(block.before.shape)
    return seen


def recorded(model: nn.Module, name: str, when: str, seen: Seen, settings: dict[str, Any]) -> Any:
    """Register a hook that keeps the tokens of a block, in the place where they are guided."""
    module = model.get_submodule(name)
    projection = output_projection(module)

    def keep(tokens: Tensor) -> None:
        setattr(seen, when, tokens.clone())

    if settings.get("placement") == "pre_projection" and projection is not None:
        return projection.register_forward_pre_hook(lambda _, args: keep(args[0]))
    return module.register_forward_hook(
        lambda _, args, output: keep(output[0] if isinstance(output, tuple) else output)
    )


@contextmanager
def marked(handle: NegToMeHandle, seen: dict[str, Seen]) -> Iterator[None]:
    """Let the guidance number the tokens that it is handed, and change nothing else."""

    def apply(tokens: Tensor, *, block: str, grid: Size | None, **_: Any) -> Tensor:
        seen[block].grid = grid
        numbers = torch.arange(1, tokens.shape[1] + 1, dtype=tokens.dtype)
        return tokens + MARK * numbers[:, None]

    with mock.patch.object(handle.guidance, "apply", apply):
        yield


@contextmanager
def changed_noise(grid: Size, changed: list[tuple[str, int]]) -> Iterator[None]:
    """Draw the same noise for all images, except for the change of each."""
    draw = torch.randn

    def randn(*args: Any, generator: torch.Generator | None = None, **more: Any) -> Tensor:
        if generator is None or generator.initial_seed() < SEED:
            return draw(*args, generator=generator, **more)
        noise = draw(*args, generator=torch.Generator().manual_seed(7), **more)
        number = (generator.initial_seed() - SEED) // UNCHANGED - 1
        if not 0 <= number < len(changed):
            return noise
        axis, band = changed[number]
        other = draw(*args, generator=torch.Generator().manual_seed(8), **more)
        return torch.where(bands(noise.shape, grid, axis == "row") == band, other, noise)

    with mock.patch.object(torch, "randn", randn):
        yield


def bands(shape: tuple[int, ...], grid: Size, of_rows: bool) -> Tensor:
    """Return the row (or column) of the grid for each number of the noise, in its shape.

    Two axes in sequence are height and width if they divide into the grid alike. Without such
    axes, one axis is a row of tokens, the rows of the grid one by one.
    """
    height, width = grid
    for axis in reversed(range(len(shape) - 1)):
        rows, columns = shape[axis : axis + 2]
        if rows % height == columns % width == 0 and rows // height == columns // width:
            place = axis if of_rows else axis + 1
            band = torch.arange(shape[place]) // (rows // height)
            return band.view(-1, *[1] * (len(shape) - 1 - place)).expand(shape)
    axis = next(axis for axis, length in enumerate(shape) if length % (height * width) == 0)
    place = torch.arange(shape[axis]) % (height * width)
    band = place // width if of_rows else place % width
    return band.view(-1, *[1] * (len(shape) - 1 - axis)).expand(shape)


def check_block(block: Seen, grid: Size, changed: list[tuple[str, int]]) -> str:
    """Return what is wrong with the guidance of a block; nothing if it is right.

    Where the guidance knows no grid, the order of the tokens is not checked.
    """
    if not len(block.after):
        return "its tokens were not handed over"
    if block.grid is not None and (block.grid[0] % grid[0] or block.grid[1] % grid[1]):
        return f"the guidance is told the grid {block.grid}, which is none of {grid}"
    numbers = ((block.after - block.before).amax(dim=2) / MARK).round().long() - 1
    change = (block.before - block.before[:UNCHANGED].repeat(len(numbers) // UNCHANGED, 1, 1)).abs()
    change = change.amax(dim=2)
    moved = change > 1e-4 * change.amax(dim=1, keepdim=True)
    for item in range(UNCHANGED, len(numbers)):
        axis, band = changed[item // UNCHANGED - 1]
        guided = numbers[item] >= 0
        if block.grid is None:
            moves = moved[item % UNCHANGED :: UNCHANGED].any(dim=0)
        else:
            moves = moved[item]
            guided = guided & (band_of(numbers[item], block.grid, grid, axis) == band)
        if not torch.equal(moves, guided):
            return (
                f"{axis} {band} of {grid} moves {places(moves)}, but the guidance takes "
                f"{places(guided)} for it"
            )
    return ""


def band_of(numbers: Tensor, grid: Size, coarse: Size, axis: str) -> Tensor:
    """Return the row or column of the coarsest grid for the numbers of tokens of a grid."""
    height, width = grid
    place = numbers % (height * width)
    if axis == "row":
        return place // width // (height // coarse[0])
    return place % width // (width // coarse[1])


def places(tokens: Tensor) -> str:
    """Return the numbers of some tokens in words."""
    return f"{tokens.nonzero().flatten().tolist()} of {len(tokens)}"
