"""Measures one shape: correctness first, then times side by side, then peak extra memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compared.candidates import CANDIDATES, OURS, Call
from ..compared.shapes import Shape, random_tokens
from . import clock, correctness, memory

MAX_INPUTS = 8
MIN_ROUNDS = {"cpu": 3, "cuda": 10}
"""A CPU takes seconds for a round of a large shape, a GPU thousands of rounds in that time."""


def rotating_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Different inputs, enough that none is still in the cache when its turn comes."""
    count = 2
    if device.type == "cuda":
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 * 2**20)
        count = math.ceil(3 * cache / (shape.elements * dtype.itemsize))
    count = max(2, min(MAX_INPUTS, count))
    return [random_tokens(shape, dtype, device, seed) for seed in range(count)]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _samplers(
    shape: Shape,
    inputs: list[Tensor],
    names: Sequence[str],
    refused: Callable[[str], str | None],
    failed: dict[str, str],
) -> dict[str, clock.Sampler]:
    make = clock.cuda_sampler if inputs[0].is_cuda else clock.cpu_sampler
    samplers = {}
    for name in names:
        reason = refused(name)
        if reason:
            failed[name] = reason
            continue
        try:
            candidate = CANDIDATES[name]
            function = candidate.prepare(shape, inputs[0])
            if candidate.exact and name != OURS:
                correctness.check(shape, inputs[0], function)
            samplers[name] = make(function, inputs)
        except Exception as error:
            # A baseline that cannot run here (no compiler, no memory) must not end the run.
            if name == OURS:
                raise
            failed[name] = _first_line(error)
    return samplers


def speeds(shape: Shape, dtype: torch.dtype, seconds: float, limits: dict[str, Any]) -> Any:
    """TFLOP/s of the matching, and its shares of the ceilings that `ceilings.measure` found.

    `of_matmul` is the time of the multiply-adds alone at the ceiling, over the time taken.
    `of_copy` is the same for the fewest bytes that must be moved. The larger one is the limit.
    """
    tflops = 2 * shape.multiply_adds / seconds / 1e12
    rate = shape.least_elements * dtype.itemsize / seconds
    return {
        "tflops": tflops,
        "of_matmul": tflops / limits["matmul_tflops"],
        "of_copy": rate / limits["copy_bytes_per_second"],
    }


def measure_times(
    shape: Shape,
    inputs: list[Tensor],
    names: Sequence[str],
    seconds: float,
    limits: dict[str, Any] | None = None,
    refused: Callable[[str], str | None] = lambda name: None,
) -> dict[str, Any]:
    """Seconds of each candidate, and its time over ours within each round."""
    failed: dict[str, str] = {}
    samplers = _samplers(shape, inputs, names, refused, failed)
    device = inputs[0].device.type
    samples = clock.interleave(samplers, seconds, min_rounds=MIN_ROUNDS[device])
    result: dict[str, Any] = {}
    for name, taken in samples.items():
        summary = clock.summarize(taken)
        result[name] = {
            "seconds": summary.as_dict(),
            "times_ours": clock.pairwise_ratio(taken, samples[OURS]).as_dict(),
            "cuda_graph": getattr(samplers[name], "captured", None),
        }
        if limits:
            result[name] |= speeds(shape, inputs[0].dtype, summary.median, limits)
    return result | {name: {"failed": reason} for name, reason in failed.items()}


def measure_memory(
    shape: Shape,
    x: Tensor,
    names: Sequence[str],
    refused: Callable[[str], str | None] = lambda name: None,
) -> dict[str, int | dict[str, str] | None]:
    """Peak bytes of each candidate beyond its input and its result."""
    extra: dict[str, int | dict[str, str] | None] = {}
    for name in names:
        if name == "matmul-into":
            continue
        reason = refused(name)
        if reason:
            extra[name] = {"failed": reason}
            continue
        try:
            if x.is_cuda:
                candidate = CANDIDATES[name]
                function: Call = candidate.prepare(shape, x)
                extra[name] = memory.cuda_extra_bytes(function, x, candidate.returns_result)
            else:
                dtype = str(x.dtype).removeprefix("torch.")
                extra[name] = memory.cpu_extra_bytes(name, shape, dtype, torch.get_num_threads())
        except RuntimeError as error:
            extra[name] = {"failed": _first_line(error)}
    return extra


def refusal(shape: Shape, dtype: torch.dtype, device: torch.device) -> Callable[[str], str | None]:
    """Function that tells why a candidate cannot run here, or returns None if it can."""
    matrix = shape.products * shape.tokens**2 * dtype.itemsize
    whole = shape.items * shape.tokens**2 * dtype.itemsize
    # `authors` holds the matrix of all items, and the temporaries of the maximum and the push.
    needs = {
        "authors": whole + 6 * shape.elements * dtype.itemsize,
        "authors-compiled": whole + 6 * shape.elements * dtype.itemsize,
        "matmul": matrix,
        "matmul-into": matrix,
    }
    free = memory.free_bytes(device)

    def refused(name: str) -> str | None:
        if shape.others and not CANDIDATES[name].others:
            return "does not match all items of a group with each other"
        needed = needs.get(name, 0)
        if free is None or needed <= 0.9 * free:
            return None
        return f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"

    return refused


def measure(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    against: Sequence[str],
    seconds: float,
    with_memory: bool,
    limits: dict[str, Any] | None = None,
    matches: bool = True,
) -> dict[str, Any]:
    """Measure one shape; the case has no times if the result is wrong.

    `matches` is the argument of `correctness.check`.
    """
    started = time.perf_counter()
    case: dict[str, Any] = {
        "name": shape.name,
        "shape": str(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "multiply_adds": shape.multiply_adds,
        "least_bytes": shape.least_elements * dtype.itemsize,
    }
    inputs = rotating_inputs(shape, dtype, device)
    try:
        case["correct"] = correctness.check(shape, inputs[0], matches=matches)
    except correctness.WrongResult as error:
        return case | {"wrong": str(error)}
    names = [OURS, *against]
    refused = refusal(shape, dtype, device)
    case["times"] = measure_times(shape, inputs, names, seconds, limits, refused)
    if with_memory:
        x = inputs[0]
        del inputs
        case["extra_bytes"] = measure_memory(shape, x, names, refused)
    return case | {"took_seconds": round(time.perf_counter() - started, 1)}
