"""Times side by side: candidates take turns, round by round, and ratios are taken within a round.

Drift of the clock speed and other load then hit all candidates alike and cancel in the ratio.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

Sampler = Callable[[], float]
"""Seconds of one call."""

WARM_UP_ROUNDS = 2
GRAPH_SECONDS = 1e-3


@dataclass(frozen=True)
class Summary:
    """Median, 20th and 80th percentiles, and number of samples."""

    median: float
    p20: float
    p80: float
    samples: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile at `share` of ascending samples, interpolated linearly."""
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def summarize(samples: Sequence[float]) -> Summary:
    """Summarize samples; raise ValueError if there are none."""
    if not samples:
        raise ValueError("no samples to summarize")
    ordered = sorted(samples)
    return Summary(
        quantile(ordered, 0.5), quantile(ordered, 0.2), quantile(ordered, 0.8), len(ordered)
    )


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> dict[str, float]:
    """Median of paired differences or ratios, with an interval that assumes no distribution.

    The ends are the samples of ranks k and n + 1 - k, with the largest k whose coverage by the
    binomial distribution is at least `confidence`. With fewer than 6 samples the interval spans
    all of them. `confidence` in the result is the coverage that was reached.
    """
    ordered, n = sorted(samples), len(samples)
    if not ordered:
        raise ValueError("no samples to summarize")

    def coverage(rank: int) -> float:
        return max(0.0, 1 - 2 * sum(math.comb(n, i) for i in range(rank)) / 2**n)

    rank = max((k for k in range(1, n // 2 + 1) if coverage(k) >= confidence), default=1)
    return {
        "median": quantile(ordered, 0.5),
        "low": ordered[rank - 1],
        "high": ordered[n - rank],
        "confidence": coverage(rank),
        "rounds": n,
    }


def pairwise_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Summary:
    """Summary of the ratios of samples of the same round."""
    if len(numerator) != len(denominator):
        raise ValueError(f"{len(numerator)} samples cannot be paired with {len(denominator)}")
    return summarize([top / bottom for top, bottom in zip(numerator, denominator, strict=True)])


def interleave(
    samplers: Mapping[str, Sampler],
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Sample in turns until `seconds` are over; each round begins with the next sampler."""
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = clock() + seconds
    rounds = 0
    while rounds < min_rounds or (clock() < end and rounds < max_rounds):
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(samplers[name]())
        rounds += 1
    return samples


def cpu_sampler(function: Callable[[Tensor], object], inputs: Sequence[Tensor]) -> Sampler:
    """Sampler of one call on a CPU; the inputs take turns."""
    calls = 0

    def sample() -> float:
        nonlocal calls
        x = inputs[calls % len(inputs)]
        calls += 1
        start = time.perf_counter()
        function(x)
        return time.perf_counter() - start

    function(inputs[0])
    return sample


def _calls_per_sample(one_call: Callable[[], object], inputs: int) -> int:
    """Number of calls that is enough for the events' resolution, with each input equally often."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    one_call()
    end.record()
    end.synchronize()
    wanted = math.ceil(GRAPH_SECONDS / max(start.elapsed_time(end) * 1e-3, 1e-6))
    return inputs * max(1, math.ceil(wanted / inputs))


def cuda_sampler(function: Callable[[Tensor], object], inputs: Sequence[Tensor]) -> Sampler:
    """Sampler of one call, averaged over the replay of a CUDA graph of calls on rotating inputs.

    The graph keeps Python's launch overhead out of all times. A function that cannot be captured is
    timed as a row of ordinary calls; `sample.captured` tells which.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for x in inputs[:2]:
            function(x)
        calls = _calls_per_sample(lambda: function(inputs[0]), len(inputs))
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    def run_all() -> None:
        for call in range(calls):
            function(inputs[call % len(inputs)])

    replay: Callable[[], object] = run_all
    captured = False
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_all()
        replay, captured = graph.replay, True
    except RuntimeError:
        torch.cuda.synchronize()

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls

    sample.captured = captured  # type: ignore[attr-defined]
    for _ in range(WARM_UP_ROUNDS):
        sample()
    return sample
