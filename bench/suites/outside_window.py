"""`python -m bench outside-window`: time that guidance costs in the steps that it leaves alone.

The embedded model runs with and without guidance, in turns on the same inputs, at a timestep that
lies outside of the window. The ratio is taken within a round; its target is at most 1.01.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from negtome_fast import provenance

from .. import results
from ..compared.denoisers import Workload, embedded
from ..timing import clock

TARGET = 1.01
FORWARDS = 5
"""Number of forwards whose mean time is one sample."""


def _sampler(workload: Workload, method: Callable[[], AbstractContextManager[Any]]) -> Any:
    timestep = next(
        t for t in workload.timesteps if not workload.config.includes_step(t, None, None, 0.0)
    )

    def sample() -> float:
        with torch.no_grad(), method():
            workload.forward(timestep)
            start = time.perf_counter()
            for _ in range(FORWARDS):
                workload.forward(timestep)
            return (time.perf_counter() - start) / FORWARDS

    return sample


def measure(workload: Workload, seconds: float) -> dict[str, Any]:
    """Measure seconds of a step without and with guidance, and the ratio of each round."""
    from negtome_fast.pipelines import negtome_guidance

    methods: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "without": nullcontext,
        "applied": lambda: negtome_guidance(workload.model, workload.config),
    }
    samplers = {name: _sampler(workload, method) for name, method in methods.items()}
    samples = clock.interleave(samplers, seconds, min_rounds=20, max_rounds=2000)
    ratios = clock.pairwise_ratio(samples["applied"], samples["without"])
    each = zip(samples["applied"], samples["without"], strict=True)
    return {
        "name": workload.name,
        "target": TARGET,
        "seconds": {name: clock.summarize(taken).as_dict() for name, taken in samples.items()},
        "ratio": ratios.as_dict(),
        "ratio_interval": clock.median_interval([top / bottom for top, bottom in each]),
    }


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench outside-window") -> int:
    """Return 0, or 1 if the interval of the ratio lies above the target."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="default: 60")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--out", type=Path, default=results.FOLDER / "outside-window-cpu.json")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    case = measure(embedded(torch.device("cpu"), torch.float32), arguments.seconds)
    results.save(arguments.out, {"schema": 1, **provenance.describe(), "outside_window": case})
    low, high = case["ratio_interval"]["low"], case["ratio_interval"]["high"]
    print(f"{case['name']}: {case['ratio']['median']:.4f} times a step without guidance")
    print(f"interval of the median {low:.4f} to {high:.4f}; written to {arguments.out}")
    return 1 if low > TARGET else 0
