"""The one table of cases that every backend runs through, and the builders of their tensors.

A case is a name, the arguments of `negtome_fast.functional.guide_tokens`, and a builder of inputs,
seeded by the name. Data are correlated across items, so that cosines lie on both sides of 0.65.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Build = Callable[[torch.Generator], tuple[Tensor, dict[str, Any]]]


def tokens(
    generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Random tokens `(..., N, D)` near a common pattern of N tokens, so that matches exist."""
    pattern = torch.randn(shape[-2:], generator=generator)
    strength = torch.rand((*shape[:-1], 1), generator=generator) * 2.5
    return (pattern * strength + torch.randn(shape, generator=generator)).to(dtype)


def moved(tensor: Tensor, device: str) -> Tensor:
    """Copy a tensor to `device` with its strides, inside a copy of all of its memory.

    `to(device)` would make a slice contiguous and drop the memory between its tokens.
    """
    length = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = tensor.as_strided((length,), (1,), 0).to(device, copy=True)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def lazily_negated(tensor: Tensor) -> Tensor:
    """The values of `tensor` as a view of their negatives in memory, as `z.conj().imag` is."""
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


@dataclass(frozen=True)
class Case:
    name: str
    build: Build = field(repr=False)
    slow: bool = False  # too large for the interpreter

    def make(self, device: str = "cpu") -> tuple[Tensor, dict[str, Any]]:
        """Make `(x, keyword arguments)`, with the same numbers in every call."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        x, arguments = self.build(generator)
        return moved(x, device), {
            name: moved(value, device) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }

    def __str__(self) -> str:
        return self.name


def plain(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, **arguments: Any
) -> Build:
    return lambda g: (tokens(g, shape, dtype), dict(arguments))


def external(
    reference: tuple[int, ...],
    shape: tuple[int, int, int] = (3, 40, 24),
    dtype: torch.dtype = torch.float32,
    **arguments: Any,
) -> Build:
    """References around the pattern of the sources: the same generator state, other noise."""

    def build(g: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        both = tokens(g, (2, *shape), dtype)
        pool = both[1].flatten(0, 1)
        chosen = torch.randint(len(pool), reference[:-1], generator=g)
        return both[0], {"reference": pool[chosen].clone(), **arguments}

    return build


def masked(build: Build, name: str, shape: tuple[int, ...], share: float = 0.5) -> Build:
    """`build` with a random bool mask of the given shape and share of True."""

    def with_mask(g: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        x, arguments = build(g)
        return x, {**arguments, name: torch.rand(shape, generator=g) < share}

    return with_mask


def altered(build: Build, change: Callable[[Tensor], Any]) -> Build:
    """`build` with its sources changed in place, or replaced by what `change` returns."""

    def changed(g: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        x, arguments = build(g)
        result = change(x)
        return (x if result is None else result), arguments

    return changed


def _poke(value: float) -> Callable[[Tensor], None]:
    """Single bad values in a source token, in a reference token, and in a whole token."""

    def change(x: Tensor) -> None:
        x[1, 3, 2] = value
        x[0, 5, 0] = value
        x[2, 7] = value

    return change


def _scale(factor: float) -> Callable[[Tensor], None]:
    def change(x: Tensor) -> None:
        x[:, ::3] *= factor

    return change


def _large(share: float) -> Callable[[Tensor], Tensor]:
    """Finite tokens of which the largest are a share of what their norms, or dtype, can hold."""

    def change(x: Tensor) -> Tensor:
        # Norms are of fp32: their squares overflow long before the numbers of bf16 and fp32 do.
        largest = min(float(torch.finfo(x.dtype).max), 1e18)
        return (x.float() * (share * largest)).clamp(-largest, largest).to(x.dtype)

    return change


def _zero(x: Tensor) -> None:
    x[1, ::4] = 0
    x[0, ::5] = 0


def _duplicates(x: Tensor) -> Tensor:
    """Small integers, every token four times: all ties are exact on every backend."""
    return x.mul(2).round().clamp(-4, 4)[:, : x.shape[1] // 4].repeat(1, 4, 1)


def _rows_apart(x: Tensor) -> Tensor:
    """The image part of `[text, image]` tokens: a slice with gaps between items."""
    batch, length, channels = x.shape
    whole = torch.full((batch, 17 + length, channels), float("nan"), dtype=x.dtype)
    whole[:, 17:] = x
    return whole[:, 17:]


def _channels_apart(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


BASE = (4, 50, 24)
ONE_EACH = torch.tensor([0.9, -0.4, 1.5])
THRESHOLDS = torch.tensor([0.65, 0.5, 0.8])

MODES: dict[str, Build] = {
    "first": plain(BASE),
    "first, groups": plain(BASE, groups=2),
    "first, masked reference": masked(plain(BASE), "reference_mask", (50,)),
    "first, mask per item": masked(plain(BASE, groups=2), "reference_mask", (4, 50)),
    "first, empty mask": masked(plain(BASE), "reference_mask", (50,), share=0.0),
    "first, source mask": masked(plain(BASE), "source_mask", (4, 50)),
    "first, source mask shared": masked(plain(BASE), "source_mask", (50,)),
    "first, pull": plain(BASE, alpha=-0.5),
    "first, alpha zero": plain(BASE, alpha=0.0),
    "first, everything": plain(BASE, threshold=-2.0),
    "first, nothing": plain(BASE, threshold=1.5),
    "first, alpha tensor": plain(BASE, alpha=torch.tensor(0.7), threshold=torch.tensor([0.6])),
    "others": plain(BASE, reference="others"),
    "others, groups": plain(BASE, reference="others", groups=2),
    "others, sum": plain(BASE, reference="others", combine="sum", alpha=0.3),
    "others, mask per item": masked(plain(BASE, reference="others"), "reference_mask", (4, 50)),
    "one reference": external((33, 24)),
    "one reference, masked": masked(external((33, 24)), "reference_mask", (33,)),
    "one token": external((1, 24)),
    "three references": external((3, 33, 24), alpha=ONE_EACH, threshold=THRESHOLDS),
    "three references, masked": masked(
        external((3, 33, 24), alpha=ONE_EACH, threshold=THRESHOLDS), "reference_mask", (3, 33)
    ),
    "three references, sum": external(
        (3, 33, 24), alpha=ONE_EACH, threshold=THRESHOLDS, combine="sum"
    ),
    "references per item": external((3, 2, 33, 24)),
    "references per item, masked": masked(external((3, 2, 33, 24)), "reference_mask", (3, 2, 33)),
    "references per item, shared mask": masked(external((3, 2, 33, 24)), "reference_mask", (2, 33)),
    "references per item, sum": external((3, 2, 33, 24), combine="sum"),
    "official": plain(BASE, matching="official"),
    "official, groups": plain(BASE, matching="official", groups=2),
    "official, masked": masked(plain(BASE, matching="official"), "reference_mask", (50,)),
    "official, source mask": masked(plain(BASE, matching="official"), "source_mask", (4, 50)),
    "official, others": plain(BASE, matching="official", reference="others"),
    "official, three references": external(
        (3, 40, 24), matching="official", alpha=ONE_EACH, threshold=THRESHOLDS
    ),
    "official, per item, sum": external((3, 2, 40, 24), matching="official", combine="sum"),
}

TOKENS: dict[str, Callable[[Build], Build]] = {
    "zero tokens": lambda b: altered(b, _zero),
    "duplicates": lambda b: altered(b, _duplicates),
    "nan": lambda b: altered(b, _poke(float("nan"))),
    "infinite": lambda b: altered(b, _poke(float("inf"))),
    "huge": lambda b: altered(b, _scale(1e15)),
    "beyond fp32 norms": lambda b: altered(b, _scale(1e25)),
    "tiny": lambda b: altered(b, _scale(1e-15)),
    "image slice": lambda b: altered(b, _rows_apart),
    "channels apart": lambda b: altered(b, _channels_apart),
}

SHAPES = [
    *((2, n, d) for n in (1, 63, 200) for d in (8, 96)),
    (3, 200, 96),
    (2, 63, 640),
    (1, 20, 8),
    (5, 1, 8),
]
SLOW_SHAPES = [(2, 1000, 96), (3, 1000, 640), (2, 2500, 40)]


def _beyond_the_range() -> list[Case]:
    """Finite tokens that a push would carry beyond the largest number of their dtype."""
    half, shape = torch.float16, (3, 40, 24)
    builds = {
        "first, float16": plain(shape, half),
        "others, float16": plain(BASE, half, reference="others"),
        "others, sum, float16": plain(BASE, half, reference="others", combine="sum"),
        "official, float16": plain(shape, half, matching="official", alpha=-3.0),
        "three references, float16": external((3, 33, 24), shape, half, alpha=2 * ONE_EACH),
        "first, bfloat16": plain(shape, torch.bfloat16, alpha=1e30),
        "others, float32": plain(shape, reference="others", alpha=-1e30),
        "others, sum, float32": plain(shape, reference="others", combine="sum", alpha=1e30),
    }
    return [Case(f"{name}, saturated", altered(b, _large(0.3))) for name, b in builds.items()]


def _table() -> list[Case]:
    cases = [Case(name, build) for name, build in MODES.items()]
    for label in ("first", "others", "official"):
        for kind, change in TOKENS.items():
            cases.append(Case(f"{label}, {kind}", change(MODES[label])))
    for dtype in (torch.bfloat16, torch.float16):
        short = str(dtype).removeprefix("torch.")
        for label, arguments in (
            ("first", {}),
            ("others", {"reference": "others"}),
            ("others, sum", {"reference": "others", "combine": "sum"}),
            ("official", {"matching": "official"}),
        ):
            cases.append(Case(f"{label}, {short}", plain((4, 50, 24), dtype, **arguments)))
        cases.append(Case(f"three references, {short}", external((3, 33, 24), dtype=dtype)))
    cases += _beyond_the_range()
    for shape in (*SHAPES, *SLOW_SHAPES):
        slow = shape in SLOW_SHAPES
        size = "x".join(map(str, shape))
        if shape[0] > 1:
            cases.append(Case(f"first, {size}", plain(shape), slow))
        own = external((2, shape[1] + 5, shape[2]), shape)
        cases.append(Case(f"two references, {size}", own, slow))
    return cases


CASES = _table()
