"""Random and adversarial problems for the fuzzer, each drawn from one number."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from negtome_fast.backends import coarse, pieces, small, torch_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Magnitudes of tokens: squares of the last overflow, so that its norm is not finite.
MAGNITUDES: dict[torch.dtype, tuple[float, ...]] = {
    torch.float32: (1e15, 1e-11, 1e-15, 1e-25, 1e-39, 1e25),
    torch.bfloat16: (1e15, 1e-11, 1e-15, 1e-25, 1e25),
    torch.float16: (5e3, 1e-3, 1e-6, 2e4),
    torch.float64: (1e100, 1e-11, 1e-100, 1e-300, 1e200),
}
TOKENS = (1, 2, 3, 5, 8, 17, 33, 40, 63, 64, 65, 100)
CHANNELS = (1, 2, 3, 4, 7, 8, 16, 17, 24, 33, 64, 96)
#: Constants of the torch backend that lead a call on one of its paths, in small blocks.
PATHS: dict[str, dict[Any, dict[str, Any]]] = {
    "as it is": {},
    "tiles": {small: {"SMALL": 0}, torch_backend: {"BLOCK_ELEMENTS": 1}},
    "coarse": {
        small: {"SMALL": 0},
        torch_backend: {"BLOCK_ELEMENTS": 1},
        pieces: {"PIECE_ELEMENTS": 500},
        coarse: {
            "LEAST_CHANNELS": 2,  # torch multiplies int8 tokens of one channel wrongly
            "LEAST_TOKENS": 1,
            "LEAST_WORK": 0,
            "BLOCK_COLUMNS": 64,
            "ROWS": 32,
            "FIRST_ROWS": 8,
            "has_int8_products": lambda: True,
        },
    },
}
TORCH_PATHS = ("as it is", *PATHS)
TRITON_KINDS = ("fused", "tiles", "coarse")


@dataclass
class Fuzzed:
    """A call and the circumstances that it is made in.

    Attributes:
        seed: the number that it was drawn from.
        x: the tokens.
        arguments: keyword arguments of `guide_tokens`, but for `inplace`, `backend`, `generator`.
        entry: `"guide"`, `"inplace"` or `"match"`.
        backend: `"torch"` or `"triton"`.
        path: one of PATHS, or of TRITON_KINDS.
        threads: number of torch's threads.
        uneven: the matrix library rounds equal columns otherwise, by place and shape.
    """

    seed: int
    x: Tensor
    arguments: dict[str, Any]
    entry: str
    backend: str
    path: str
    threads: int
    uneven: bool


class _Draw:
    """Draws of one problem: all follow from its seed."""

    def __init__(self, seed: int, tiny: bool) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.tiny = tiny
        kinds = DTYPES[:3] if tiny else DTYPES
        self.dtype = self.random.choices(kinds, (5, 3, 2, 2)[: len(kinds)])[0]

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def bools(self, *shape: int) -> Tensor:
        share = self.random.choice((0.0, 0.1, 0.5, 0.5, 0.9, 1.0))
        return torch.rand(shape, generator=self.generator) < share

    def tokens(self, pattern: Tensor, items: int, count: int) -> Tensor:
        """Tokens `(items, count, D)` of one kind, most of them near tokens of a common pattern."""
        channels = pattern.shape[1]
        which = torch.randint(len(pattern), (items, count), generator=self.generator)
        noise = self.normal(items, count, channels)
        kind = self.random.choice(("noise", "near", "near", "mean", "whole", "signs", "copies"))
        if kind == "noise":
            values = noise
        elif kind == "near":
            values = pattern[which] + self.random.choice((0.1, 0.5, 1.0)) * noise
        elif kind == "mean":
            values = 30 * pattern[:1] + noise
        elif kind == "whole":
            values = (2 * noise).round()
        elif kind == "signs":
            values = noise.sign()
        else:
            values = pattern[which]
        return values

    def spoil(self, values: Tensor) -> Tensor:
        """Convert to the dtype, then copy, scale, empty, nudge or break single tokens."""
        items, count, channels = values.shape
        if self.chance(0.2):
            scale = self.random.choice(MAGNITUDES[self.dtype])
            # The norm of one channel is its magnitude: no square overflows.
            scale = 1.0 if channels == 1 and scale > 1e19 else scale
            values[:, :: self.random.choice((1, 2, 3))] *= scale
        values = values.to(self.dtype)
        if self.chance(0.4) and count > 1:
            few = self.random.randint(1, count)
            values = values[:, torch.randint(few, (count,), generator=self.generator)]
        if self.chance(0.15) and items > 1:
            values[self.random.randrange(items)] = values[self.random.randrange(items)]
        if self.chance(0.15):
            values[:, :: self.random.choice((2, 3))] = 0
        if self.chance(0.15) and count > 1:
            # Two tokens that differ by one unit in the last place.
            values[:, -1] = values[:, 0]
            up = torch.full((), float("inf"), dtype=self.dtype)
            values[:, -1, 0] = torch.nextafter(values[:, -1, 0], up)
        if self.chance(0.15):
            item, token = self.random.randrange(items), self.random.randrange(count)
            bad = self.random.choice((float("nan"), float("inf"), -float("inf")))
            values[item, token, self.random.randrange(channels)] = bad
        return values

    def strided(self, values: Tensor, keep: bool = False) -> Tensor:
        """The same values with other strides; with `keep`, no two of them share memory."""
        items, count, channels = values.shape
        kind = self.random.choice(
            ("plain", "plain", "swapped", "sliced", "channels", "gaps", "expanded")
        )
        if kind == "swapped":
            return values.transpose(0, 1).contiguous().transpose(0, 1)
        if kind == "sliced":
            start = self.random.choice((1, 3, 16))
            whole = torch.full((items, start + count, channels), float("nan"), dtype=self.dtype)
            whole[:, start:] = values
            return whole[:, start:]
        if kind == "channels":
            return values.transpose(1, 2).contiguous().transpose(1, 2)
        if kind == "gaps":
            whole = torch.full((items, count, 2 * channels + 1), float("nan"), dtype=self.dtype)
            whole[..., 1::2] = values
            return whole[..., 1::2]
        if kind == "expanded" and not keep:
            if self.chance(0.5):
                return values[:1].contiguous().expand(values.shape)
            return values[:, :1].contiguous().expand(values.shape)
        return values.contiguous()

    def size(self) -> tuple[int, int, int]:
        channels = self.random.choice(CHANNELS[:8] if self.tiny else CHANNELS)
        count = self.random.choice(TOKENS[:6] if self.tiny else TOKENS)
        if not self.tiny and self.chance(0.01):
            count, channels = self.random.randint(257, 400), self.random.choice(CHANNELS[:8])
        items = self.random.choice((1, 2, 2, 3) if count > 60 or self.tiny else (1, 2, 3, 4, 6))
        return items, count, channels


def _groups(draw: _Draw, items: int, least: int) -> int:
    return draw.random.choice(
        [g for g in range(1, items + 1) if not items % g and items // g >= least]
    )


def draw(seed: int, triton: bool = False) -> Fuzzed:
    """Draw problem number `seed`; those for the interpreted kernels are tiny."""
    d = _Draw(seed, triton)
    items, count, channels = d.size()
    mode = d.random.choice(("first", "first", "others", "shared", "per item"))
    if items == 1 and mode in ("first", "others"):
        mode = "shared"
    official = d.chance(0.25)
    entry = "match" if not official and d.chance(0.15) else "guide"
    pattern = d.normal(d.random.randint(1, count), channels)
    x = d.spoil(d.tokens(pattern, items, count))
    arguments: dict[str, Any] = {"matching": "official"} if official else {}
    references, slots, length = 1, 1, count
    if mode in ("first", "others"):
        groups = _groups(d, items, 1 if mode == "first" and d.chance(0.05) else 2)
        arguments |= {"reference": mode, "groups": groups}
        slots = 1 if mode == "first" else items // groups - 1
        mask_shapes: list[tuple[int, ...]] = [(count,), (items, count)]
    else:
        references = slots = d.random.choice((1, 1, 2, 3))
        length = count if official else d.random.choice(TOKENS[:7] if triton else TOKENS)
        total = references * (items if mode == "per item" else 1)
        r = d.spoil(d.tokens(pattern, total, length))
        if d.chance(0.4) and length == count:
            r[d.random.randrange(total)] = x[d.random.randrange(items)]
        r = d.strided(r)
        mask_shapes = [(references, length)]
        if mode == "per item":
            r = r.unflatten(0, (items, references))
            mask_shapes.append((items, references, length))
        elif references == 1 and d.chance(0.5):
            r = r[0]
            mask_shapes = [(length,)]
        arguments["reference"] = r
    if entry == "guide" and d.chance(0.2):
        entry = "inplace"
    x = d.strided(x, keep=entry == "inplace")
    if d.chance(0.35):
        arguments["reference_mask"] = d.bools(*d.random.choice(mask_shapes))
    if entry != "match":
        _draw_push(d, arguments, x, slots)
    return Fuzzed(
        seed,
        x,
        arguments,
        entry,
        "triton" if triton else "torch",
        path=d.random.choice(TRITON_KINDS if triton else TORCH_PATHS),
        threads=2 if not triton and d.chance(0.1) else 1,
        uneven=not triton and d.chance(0.4),
    )


def _draw_push(d: _Draw, arguments: dict[str, Any], x: Tensor, slots: int) -> None:
    """Add what only the push reads."""
    alphas, thresholds = (
        (0.9, 0.9, -0.5, 0.0, 2.5, 100.0, 1e20, 1e-3),
        (-1.0, -2.0, 0.3, 0.65, 1.0, 1.5),
    )
    arguments["combine"] = d.random.choice(("nearest", "nearest", "nearest", "sum"))
    if slots > 1 and d.chance(0.5):
        arguments["alpha"] = torch.tensor([d.random.choice(alphas) for _ in range(slots)])
    else:
        arguments["alpha"] = d.random.choice(alphas)
    if slots > 1 and d.chance(0.4):
        arguments["threshold"] = torch.tensor([d.random.choice(thresholds) for _ in range(slots)])
    elif d.chance(0.1):
        arguments["threshold"] = _some_cosine(d, arguments["reference"], x)
    else:
        arguments["threshold"] = d.random.choice(thresholds)
    if d.chance(0.25):
        shape = d.random.choice(((x.shape[1],), (1, x.shape[1]), (x.shape[0], x.shape[1])))
        arguments["source_mask"] = d.bools(*shape)
    if d.chance(0.1):
        arguments["dropout"] = d.random.choice((0.0, 0.3, 1.0))


def _some_cosine(d: _Draw, reference: Tensor | str, x: Tensor) -> float:
    """The cosine of two of the tokens: a threshold that is met exactly, or nearly."""
    target = x if isinstance(reference, str) else reference
    one = x[-1, d.random.randrange(x.shape[1])].double()
    other = target.reshape(-1, x.shape[2])[d.random.randrange(target.shape[-2])].double()
    cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
    return cosine if abs(cosine) <= 1 else 1.0


def rounding_by_place(multiply: Any) -> Any:
    """A product whose columns are rounded by their place and by the product's width."""

    def product(rows: Tensor, columns: Tensor, **out: Tensor) -> Tensor:
        result = multiply(rows, columns, **out)
        width = result.shape[-1]
        place = (torch.arange(width) * 7 + width) % 3 - 1
        return result.mul_(1 + place.to(result.dtype) * torch.finfo(result.dtype).eps)

    return product


@contextmanager
def circumstances(problem: Fuzzed) -> Iterator[None]:
    """Make the torch backend run as a problem says."""
    changes = [
        (module, name, value)
        for module, values in (PATHS[problem.path] if problem.backend == "torch" else {}).items()
        for name, value in values.items()
    ]
    if problem.uneven:
        changes += [
            (torch, name, rounding_by_place(getattr(torch, name))) for name in ("mm", "bmm")
        ]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    threads = torch.get_num_threads()
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        if threads != problem.threads:
            torch.set_num_threads(problem.threads)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        if threads != problem.threads:
            torch.set_num_threads(threads)
