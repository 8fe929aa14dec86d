"""Measures one shape: correctness first, then times side by side, then peak extra memory."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import correctness, memory, timing
from .candidates import CANDIDATES, OURS, Call
from .shapes import Shape, random_tokens

MAX_INPUTS = 8


def rotating_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Enough different inputs that none is still in the cache when its turn comes."""
    count = 2
    if device.type == "cuda":
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 * 2**20)
        count = math.ceil(3 * cache / (shape.elements * dtype.itemsize))
    count = max(2, min(MAX_INPUTS, count))
    return [random_tokens(shape, dtype, device, seed) for seed in range(count)]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _samplers(
    shape: Shape, inputs: list[Tensor], names: Sequence[str], failed: dict[str, str]
) -> dict[str, timing.Sampler]:
    make = timing.cuda_sampler if inputs[0].is_cuda else timing.cpu_sampler
    samplers = {}
    for name in names:
        try:
            samplers[name] = make(CANDIDATES[name].prepare(shape, inputs[0]), inputs)
        except Exception as error:
            # A baseline that cannot run here (no compiler, no memory) must not end the run.
            if name == OURS:
                raise
            failed[name] = _first_line(error)
    return samplers


def measure_times(
    shape: Shape, inputs: list[Tensor], names: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Seconds of each candidate, and its time over ours, paired by round."""
    failed: dict[str, str] = {}
    samplers = _samplers(shape, inputs, names, failed)
    samples = timing.interleave(samplers, seconds)
    result: dict[str, Any] = {}
    for name, taken in samples.items():
        result[name] = {
            "seconds": timing.summarize(taken).as_dict(),
            "times_ours": timing.pairwise_ratio(taken, samples[OURS]).as_dict(),
            "cuda_graph": getattr(samplers[name], "captured", None),
        }
    return result | {name: {"failed": reason} for name, reason in failed.items()}


def measure_memory(
    shape: Shape, x: Tensor, names: Sequence[str]
) -> dict[str, int | dict[str, str] | None]:
    """Bytes each candidate needs at its peak beyond its input and its result."""
    extra: dict[str, int | dict[str, str] | None] = {}
    for name in names:
        if name == "matmul-into":
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


def measure(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    against: Sequence[str],
    seconds: float,
    with_memory: bool,
) -> dict[str, Any]:
    """All that is known about one shape; without times where the result is wrong."""
    started = time.perf_counter()
    case: dict[str, Any] = {
        "name": shape.name,
        "shape": str(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "multiply_adds": shape.multiply_adds,
    }
    inputs = rotating_inputs(shape, dtype, device)
    try:
        case["correct"] = correctness.check(shape, inputs[0])
    except correctness.WrongResult as error:
        return case | {"wrong": str(error)}
    names = [OURS, *against]
    if not shape.memory_only:
        case["times"] = measure_times(shape, inputs, names, seconds)
    if with_memory:
        x = inputs[0]
        del inputs
        case["extra_bytes"] = measure_memory(shape, x, names)
    return case | {"took_seconds": round(time.perf_counter() - started, 1)}
