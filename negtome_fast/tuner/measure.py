"""Measure configurations: check them on random tokens, then time the whole operator."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels import tuning
from ..kernels.tuning import Config, Problem
from .space import TokenShape

Mode = Literal["first", "others"]
#: Bytes of all rotating inputs together, so that no input stays in a cache between two uses.
ROTATION_BYTES = 256 * 2**20


def random_tokens(shape: TokenShape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Random tokens; every other one resembles a token of its group's first item."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.items, shape.tokens, shape.channels)
    x = torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)
    group = shape.items // shape.groups
    for item in range(shape.items):
        if item % group:
            order = torch.randperm(shape.tokens, generator=generator, device=device)
            x[item, ::2].lerp_(x[item - item % group, order[::2]], 0.7)
    return x


@contextmanager
def forced(kind: str, **configurations: Config) -> Iterator[None]:
    """Context in which every launch is of this kind, with these configurations, not the table's."""
    original = tuning.plan

    def plan(*problem: Any) -> tuning.Plan:
        return original(*problem)._replace(kind=kind, **configurations)

    tuning.plan = plan
    try:
        yield
    finally:
        tuning.plan = original


def wrong(x: Tensor, reference: Mode, groups: int, expected: Tensor) -> str | None:
    """Fault of the Triton backend's result on `x`, in words; None if it is right.

    expected: (B, 1, N), the best cosines. The cosine of the chosen token must equal them up to
    rounding, and the output must be the push that was reported.
    """
    from ..functional import guide_tokens

    y, similarity, pushed = guide_tokens(
        x, reference, groups=groups, alpha=0.9, threshold=0.65, backend="triton"
    )
    tolerance = torch.finfo(torch.float32).eps * (8.0 + 4.0 * x.shape[2] ** 0.5)
    found = expected > -torch.inf
    if not torch.equal(similarity > -torch.inf, found):
        return "a match where there is none, or none where there is one"
    lost = (similarity - expected)[found].abs()
    if lost.numel() and not float(lost.max()) <= tolerance:
        return f"a cosine is off by {float(lost.max()):.1e}"
    tokens, size = x.shape[1], x.shape[0] // groups
    for item in range(x.shape[0]):
        moves = pushed[item, 0] >= 0
        slot, token = pushed[item, 0] // tokens, pushed[item, 0] % tokens
        start = item - item % size
        others = reference == "others"
        source = start + slot + (slot >= item % size) if others else start + 0 * slot
        matched = x[source[moves], token[moves]].float()
        want = x[item].float()
        want[moves] += 0.9 * (want[moves] - matched)
        unit = torch.finfo(x.dtype).eps
        error = (y[item].float() - want).abs() - unit * want.abs()
        if not float(error.max()) <= 1e-5 * (1 + float(want.abs().max())):
            return f"item {item} was pushed wrongly"
    return None


def seconds_of(calls: Sequence[Callable[[], object]], budget: float = 0.2) -> float:
    """Median seconds of one call, from replays of a CUDA graph that holds all `calls` once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - started < budget and len(times) < 100):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(times)


class Bench:
    """Random inputs of one shape, with a check of the results and a timer of the operator."""

    def __init__(
        self, shape: TokenShape, dtype: str, device: torch.device, reference: Mode
    ) -> None:
        from ..functional import guide_tokens

        self.shape, self.reference = shape, reference
        torch_dtype = getattr(torch, dtype)
        size = shape.items * shape.tokens * shape.channels * torch_dtype.itemsize
        sets = max(1, min(8, -(-ROTATION_BYTES // size)))
        self.inputs = [random_tokens(shape, torch_dtype, device, seed) for seed in range(sets)]
        _, self.expected, _ = guide_tokens(
            self.inputs[0], reference, groups=shape.groups, backend="torch"
        )

    def wrong(self) -> str | None:
        return wrong(self.inputs[0], self.reference, self.shape.groups, self.expected)

    def seconds(self) -> float:
        from ..functional import negtome

        def call(x: Tensor) -> Callable[[], object]:
            return lambda: negtome(x, self.reference, groups=self.shape.groups, backend="triton")

        return seconds_of([call(x) for x in self.inputs])


def fastest(
    bench: Any,
    kind: str,
    kernel: str,
    candidates: Iterable[Config],
    fixed: dict[str, Config],
    say: Callable[[str], None],
    left: Callable[[], float],
) -> tuple[Config, float] | None:
    """The candidate of `kernel` with which the whole operator is fastest, and its seconds.

    After its first result it stops when it has used a quarter of the time that was left, so that
    later kernels get their share. It reports and skips candidates that fail or are wrong. Returns
    None if no candidate is right, or if there is no time.
    """
    end = time.monotonic() + left() / 4
    best: tuple[Config, float] | None = None
    for config in candidates:
        if left() <= 0 or (best is not None and time.monotonic() > end):
            break
        with forced(kind, **{**fixed, kernel: config}):
            try:
                reason = bench.wrong()
                seconds = float("inf") if reason else bench.seconds()
            except Exception as error:  # drivers and compilers raise any type of error
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if reason:
            say(f"  {kernel} {list(config)}: left out, {reason}")
            continue
        say(f"  {kernel} {list(config)}: {seconds * 1e6:.1f} us")
        if best is None or seconds < best[1]:
            best = config, seconds
    return best


def tune_shape(
    shape: TokenShape,
    dtype: str,
    candidates: Callable[[str, Problem], list[Config]],
    base: tuning.Plan,
    bench: Callable[[TokenShape, Mode], Any],
    say: Callable[[str], None],
    left: Callable[[], float],
) -> dict[str, Any] | None:
    """Measure one shape; returns its entry of the table, or None if time ends before tiles.

    bench: makes the `Bench` of a shape and a reference. Kernels that were not measured keep the
    configuration of `base`; so does the kind, unless tiles and fused were both measured.
    """
    problem = shape.problem(dtype)
    chosen = {kernel: base.configuration(kernel) for kernel in tuning.TUNED}
    seconds: dict[str, float] = {}

    def choose(some: Any, kind: str, kernel: str, tried: list[Config]) -> None:
        best = fastest(some, kind, kernel, tried, chosen, say, left)
        if best is not None:
            chosen[kernel], seconds[kernel] = best

    if left() <= 0:
        return None
    first = bench(shape, "first")
    for kernel, kind in (("tiles", "tiles"), ("fused", "fused"), ("push_from_keys", "tiles")):
        if left() > 0:
            choose(first, kind, kernel, candidates(kernel, problem))
    if "tiles" not in seconds:
        return None
    if left() > 0:
        # Try the push of some items beside the matching of others, with the best tiles.
        best = chosen["tiles"]
        both = [best, best._replace(OVERLAP=1 - best.OVERLAP)]
        choose(first, "tiles", "tiles", both)
    del first  # frees its inputs before those of the other mode are made
    if left() > 0 and "pairs" in shape.kernels:
        tried = candidates("pairs", shape.problem(dtype, others=True))
        choose(bench(shape, "others"), "tiles", "pairs", tried)
    kind = base.kind
    if "fused" in seconds:
        tiles = min(seconds["tiles"], seconds.get("push_from_keys", float("inf")))
        kind = "tiles" if tiles <= seconds["fused"] else "fused"
    return {
        **problem._asdict(),
        "kind": kind,
        "measured": True,
        **{kernel: list(config) for kernel, config in chosen.items()},
        "microseconds": {name: round(value * 1e6, 2) for name, value in seconds.items()},
    }
