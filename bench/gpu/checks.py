"""Checks of one kind of kernel: right by the fp64 oracle, in place, repeated, in a CUDA graph.

The oracle is the one of the tests, `tests/helpers/oracle.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._path import ROOT
from ..compared.shapes import parse_shape, random_tokens
from ..timing import correctness
from ..timing.launches import POINTERS, WAYS, launching
from .poison import poisoned

SHAPES = {"cuda": ("4x257x320/2", "3x200x96"), "cpu": ("4x13x20/2",)}
"""Device -> shapes that no tile divides, with one group and with two."""
LARGE = {"cuda": ("4x2304x3072", "8x1024x1280/2"), "cpu": ("2x17x20",)}
"""Device -> shapes of models, in which a program takes several tiles."""
REPETITIONS = {"cuda": 20, "cpu": 2}
DTYPES = {"cuda": (torch.bfloat16, torch.float16, torch.float32), "cpu": (torch.bfloat16,)}
"""Device -> dtypes; a rehearsal has time for one."""


@dataclass(frozen=True)
class Work:
    """One call of a kind, with its check.

    Attributes:
        name: mode, shape and dtype.
        x: the tokens.
        call: the results for some tokens.
        verify: raises if the results of `call` are wrong.
        in_place: writes the first result into its argument and returns it.
    """

    name: str
    x: Tensor
    call: Callable[[Tensor], tuple[Tensor, ...]]
    verify: Callable[[Tensor, tuple[Tensor, ...]], None]
    in_place: Callable[[Tensor], Tensor] | None = None


def oracle() -> Any:
    """`tests/helpers/oracle.py`."""
    folder = str(ROOT / "tests")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("helpers.oracle")
    finally:
        sys.path.remove(folder)


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers: NaN equals NaN, and 0 differs from -0."""
    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(wide)


# --- the calls of every kind


def _guide(x: Tensor, name: str, **arguments: Any) -> Work:
    from negtome_fast.functional import guide_tokens

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return guide_tokens(x, backend="triton", **arguments)

    def verify(x: Tensor, results: tuple[Tensor, ...]) -> None:
        oracle().Problem(x, arguments).check_guide(*results)

    def in_place(x: Tensor) -> Tensor:
        return guide_tokens(x, backend="triton", inplace=True, **arguments)[0]

    return Work(name, x, call, verify, in_place)


def _match(x: Tensor, name: str, **arguments: Any) -> Work:
    from negtome_fast import ops
    from negtome_fast.arguments import check_problem

    groups, matching = arguments.get("groups", 1), arguments.get("matching", "paper")
    reference, mask = arguments.get("reference", "first"), arguments.get("reference_mask")

    def call(x: Tensor) -> tuple[Tensor, ...]:
        p = check_problem(x, reference, mask, matching, groups)
        return ops.match(
            x, p.reference, p.mask, p.pairing.mode, groups, p.pairing.per_item, matching, "triton"
        )

    def verify(x: Tensor, results: tuple[Tensor, ...]) -> None:
        oracle().Problem(x, arguments).check_match(*results)

    return Work(name, x, call, verify)


def _scale(x: Tensor, name: str) -> Work:
    from negtome_fast.backends.triton_coarse import column_scales
    from negtome_fast.call import Call
    from negtome_fast.pairing import Pairing

    def call(x: Tensor) -> tuple[Tensor, ...]:
        # Places after the last token, up to a whole block, are marked as negative.
        scale = column_scales(Call(x, x, Pairing("others", len(x))))
        assert bool((scale[:, x.shape[1] :] < 0).all()), "a place without a token has a scale"
        return (scale[:, : x.shape[1]],)

    def verify(x: Tensor, results: tuple[Tensor, ...]) -> None:
        norm = torch.linalg.vector_norm(x.double(), dim=-1).clamp_min(1e-12)
        torch.testing.assert_close(results[0].double(), 1 / norm, rtol=1e-5, atol=0)

    return Work(name, x, call, verify)


def _nudge(dtype: torch.dtype, device: str, objective: str) -> Work:
    import negtome_fast as nf

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    width = 5000 if device == "cuda" else 40
    step_size = {"paper": 0.1, "squared": 1.0, "cosine": 0.03}[objective]
    options: dict[str, Any] = {"objective": objective, "step_size": step_size, "steps": 6}
    points: dict[str, Any] = {"desired": draw(2, width, scale=0.3), "beta": 3.0}
    points["undesired"] = draw(5, width, scale=0.5)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        result = nf.nudge(x, backend="triton", **points, **options)
        return result.latents, result.distance

    def verify(x: Tensor, results: tuple[Tensor, ...]) -> None:
        wide: dict[str, Any] = {
            k: v.double() if isinstance(v, Tensor) else v for k, v in points.items()
        }
        expected = nf.nudge(x.double(), backend="reference", **wide, **options)
        limit = torch.finfo(dtype).eps / 2 * expected.latents.abs() + 1e-5
        error = (results[0].double() - expected.latents).abs()
        assert bool((error <= limit).all()), f"off by {float(error.max()):.1e}"
        torch.testing.assert_close(results[1].double(), expected.distance, rtol=1e-5, atol=1e-5)

    return Work(f"{objective}, {str(dtype).removeprefix('torch.')}", draw(3, width), call, verify)


def works(kind: str, dtype: torch.dtype, device: str) -> Iterator[Work]:
    """The small calls of a kind, for the oracle."""
    if kind == "nudge":
        for objective in ("paper", "squared", "cosine"):
            yield _nudge(dtype, device, objective)
        return
    for text in SHAPES[device]:
        shape = parse_shape(text)
        x = random_tokens(shape, dtype, device)
        groups = {"groups": shape.groups}
        # Masks of reference and sources have patterns that no tile divides.
        some = torch.arange(shape.tokens, device=device)
        masks = {"reference_mask": some % 5 > 0, "source_mask": some % 3 > 0}
        name = f"{text}, {str(dtype).removeprefix('torch.')}"
        if kind == "scale":
            yield _scale(x, name)
        elif kind in ("tiles overlapped", "coarse"):
            yield _guide(x, f"first, masked, {name}", **groups, **masks)
            yield _guide(x, f"handed over, {name}", reference=x[:2].clone())
        elif kind in ("fused", "push_from_keys"):
            yield _guide(x, f"first, {name}", **groups)
            yield _guide(x, f"first, masked, {name}", **groups, **masks)
            yield _guide(x, f"others, {name}", reference="others", **groups)
        elif kind.startswith("tiles"):
            yield _match(x, f"first, {name}", **groups)
            yield _match(x, f"handed over, {name}", reference=x[:2].clone())
        elif kind.startswith("pairs"):
            yield _match(x, f"others, {name}", reference="others", **groups)
        elif kind == "resolve":
            yield _match(x, f"official, {name}", matching="official", **groups)
            yield _match(x, f"official, others, {name}", reference="others", matching="official")
        else:
            yield _guide(x, f"official, {name}", matching="official", **groups)
            yield _guide(x, f"sum, {name}", reference="others", combine="sum", **groups)


def way(kind: str) -> contextlib.AbstractContextManager[Any]:
    """Context in which the launches are of one kind."""
    if kind in ("fused", "coarse"):
        return launching(kind)
    if kind.startswith(("tiles", "pairs")):
        _, _, form = kind.partition(" ")
        return launching("tiles", WAYS.get(form, POINTERS))
    return launching("tiles" if kind == "push_from_keys" else None)


# --- the checks


def _right(work: Work) -> None:
    before = work.x.clone()
    with poisoned():
        results = work.call(work.x)
    assert torch.equal(bits(work.x), bits(before)), "the input was written to"
    work.verify(work.x, results)


def _same_bits(work: Work) -> None:
    first = work.call(work.x)
    for number in range(REPETITIONS[work.x.device.type] - 1):
        for one, again in zip(first, work.call(work.x), strict=True):
            assert torch.equal(bits(again), bits(one)), f"other bits at repetition {number + 2}"


def _in_place(work: Work) -> None:
    assert work.in_place is not None
    expected = work.call(work.x)[0]
    x = work.x.clone()
    with poisoned():
        returned = work.in_place(x)
    assert returned is x or returned.data_ptr() == x.data_ptr(), "another tensor came back"
    assert torch.equal(bits(x), bits(expected)), "in place gives other bits"


def _graph(work: Work) -> None:
    """Check that a replayed graph computes from the current content of its input."""
    x = work.x.clone()
    second = work.x.flip(1).contiguous()
    expected = work.call(second)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work.call(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work.call(x)
    x.copy_(second)
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(bits(one), bits(other)), "the replay gives other bits"


def _large(kind: str, text: str, dtype: torch.dtype, device: str) -> None:
    others = ",others" if kind.startswith("pairs") else ""
    shape = parse_shape(text + others)
    with poisoned():
        # `match_tokens` always launches tiles, so other kinds must not call it.
        x = random_tokens(shape, dtype, device)
        correctness.check(shape, x, matches=kind.startswith("tiles"))


def checks(kind: str, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and call of every check of a kind.

    All calls run in bfloat16, and one in each other dtype, since compiling takes most of the time.
    """
    for dtype in DTYPES[device]:
        if kind.endswith(("descriptors", "flattened")) and dtype == torch.float32:
            continue  # no tuning table has them in fp32
        every = None if dtype == torch.bfloat16 else 1
        for work in itertools.islice(works(kind, dtype, device), every):
            yield f"right, {work.name}", partial(_right, work)
            yield f"same bits, {work.name}", partial(_same_bits, work)
            if work.in_place:
                yield f"in place, {work.name}", partial(_in_place, work)
            # The host reads why nudging stopped, which a capture does not allow.
            if device == "cuda" and kind != "nudge":
                yield f"graph, {work.name}", partial(_graph, work)
        if kind == "fused" or kind.startswith(("tiles", "pairs")):
            for text in LARGE[device][:every]:
                name = f"large, {text}, {str(dtype).removeprefix('torch.')}"
                yield name, partial(_large, kind, text, dtype, device)
