"""`python -m bench.gpu.each DEVICE FILE SHAPE[=KIND,KIND]...`: the time of every kernel by itself.

Torch's profiler takes the times. If it does not see the device, events around each launch of a
Triton kernel do. Times are medians over some calls on rotating inputs, in microseconds. `=KIND,...`
names kinds that failed.
"""

from __future__ import annotations

import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..compared.candidates import CANDIDATES, OURS
from ..compared.shapes import parse_shape
from ..results import save
from ..timing.launches import choice, launching
from ..timing.measure import rotating_inputs

CALLS = 8


def by_profiler(call: Callable[[], None], on_gpu: bool) -> list[dict[str, Any]]:
    """Kernels by their time: name, launches, and microseconds of one launch.

    On a CPU the operators of torch take their place, so that a rehearsal runs this too.
    """
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiled:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    taken: dict[str, list[float]] = {}
    for event in profiled.events():
        seen = event.device_type == torch.autograd.DeviceType.CUDA
        if seen == on_gpu and not event.name.startswith("cuda"):
            range_of = event.time_range
            taken.setdefault(event.name, []).append(range_of.end - range_of.start)
    return _rows(taken)


def by_events(call: Callable[[], None]) -> list[dict[str, Any]]:
    """`by_profiler` for Triton's kernels alone, from events that Triton's hooks record."""
    import triton

    hooks = triton.knobs.runtime
    begun: list[tuple[str, torch.cuda.Event]] = []
    pairs: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def event() -> torch.cuda.Event:
        made = torch.cuda.Event(enable_timing=True)
        made.record()
        return made

    def enter(metadata: Any) -> None:
        begun.append((str(metadata.get()["name"]), event()))

    def leave(metadata: Any) -> None:
        pairs.append((*begun.pop(), event()))

    hooks.launch_enter_hook.add(enter)
    hooks.launch_exit_hook.add(leave)
    try:
        call()
        torch.cuda.synchronize()
    finally:
        hooks.launch_enter_hook.remove(enter)
        hooks.launch_exit_hook.remove(leave)
    taken: dict[str, list[float]] = {}
    for name, begin, end in pairs:
        taken.setdefault(name, []).append(begin.elapsed_time(end) * 1e3)
    return _rows(taken)


def _rows(taken: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows = [
        {"kernel": name[:120], "launches": len(times), "microseconds": statistics.median(times)}
        for name, times in taken.items()
    ]
    return sorted(rows, key=lambda row: -row["launches"] * row["microseconds"])


def measure_one(text: str, broken: Sequence[str], device: str) -> dict[str, Any]:
    """The kernels of one shape by the first method that sees any, or the reason for none."""
    shape = parse_shape(text)
    way = choice(shape, broken)
    case: dict[str, Any] = {"shape": text, "dtype": "bfloat16", "calls": CALLS}
    if isinstance(way, str):
        return case | {"skipped": way}
    inputs = rotating_inputs(shape, torch.bfloat16, torch.device(device))
    function = CANDIDATES[OURS].prepare(shape, inputs[0])

    def call() -> None:
        for number in range(CALLS):
            function(inputs[number % len(inputs)])

    methods: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "profiler": lambda: by_profiler(call, device == "cuda")
    }
    if device == "cuda":
        methods["events"] = lambda: by_events(call)
    failed: dict[str, str] = {}
    with launching(*way):
        call()
        for name, method in methods.items():
            try:
                kernels = method()
            except Exception:
                failed[name] = traceback.format_exc()
                print(f"{text}, {name}: {failed[name]}", flush=True)
                continue
            if kernels:
                return case | {"by": name, "kernels": kernels, "methods_failed": failed}
    return case | {"failed": 1, "error": "no method saw a kernel", "methods_failed": failed}


def main(argv: Sequence[str]) -> int:
    """Return 0, or 1 if a shape could not be measured."""
    device, path, *shapes = argv
    result: dict[str, Any] = {"kernels_of": []}
    for entry in shapes:
        text, _, kinds = entry.partition("=")
        try:
            found = measure_one(text, kinds.split(",") if kinds else (), device)
        except Exception as error:
            trace = traceback.format_exc()
            print(trace, flush=True)
            found = {"shape": text, "failed": 1, "error": str(error), "traceback": trace}
        result["kernels_of"].append(found)
        save(Path(path), result)
        print(text, flush=True)
        for row in found.get("kernels", ())[:8]:
            print(f"  {row['microseconds']:10.1f} us  x {row['launches']}  {row['kernel'][:90]}")
        sys.stdout.flush()
    return int(any("failed" in found for found in result["kernels_of"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
