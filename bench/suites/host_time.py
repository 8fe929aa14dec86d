"""`python -m bench host-time`: the host's time of one guided call on a GPU, without a GPU.

Checks, plan, memory and Triton's binding of arguments run as for an H100. Only the driver is a
stand-in, which takes the place of the launch and of the encoding of tensor maps; tokens lie in host
memory. The driver's launch adds a few microseconds that are not seen here. Kernels are compiled for
sm_90 once. The target is 60 us for mode "first".
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from negtome_fast import provenance

from .. import results

TARGET = 60e-6
CALLS = 200
CASES = {
    "FLUX 1024 px, first": ((4, 4096, 3072), 1, "first", True),
    "SDXL 1024 px 64x64, first": ((8, 4096, 640), 2, "first", True),
    "SDXL 1024 px 32x32, first": ((8, 1024, 1280), 2, "first", True),
    "SDXL 1024 px 32x32, others": ((8, 1024, 1280), 2, "others", False),
    "small, first, out of place": ((4, 256, 640), 1, "first", False),
}
"""Name -> (items, tokens, channels), groups, mode, in place; pipelines call it in place."""


class StandIn:
    """A driver for Triton without a device; `launches` counts the launches."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.launches = 0
        self.target = GPUTarget("cuda", 90, 32)
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, threads of a block."""
        return 1, 1, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            self.launches += 1

        return launch


def calls() -> dict[str, Callable[[], object]]:
    """A guided call for each case."""
    import negtome_fast as nf

    found: dict[str, Callable[[], object]] = {}
    for name, (shape, groups, mode, inplace) in CASES.items():
        # Never read: no memory is touched.
        x = torch.empty(shape, dtype=torch.bfloat16)

        def call(
            x: torch.Tensor = x, groups: int = groups, mode: Any = mode, inplace: bool = inplace
        ) -> object:
            return nf.negtome(x, mode, groups=groups, inplace=inplace, backend="triton")

        found[name] = call
    return found


def measure(rounds: int) -> list[dict[str, Any]]:
    """Median seconds of a call, over `rounds` runs of CALLS calls of each case in turn."""
    import triton

    from negtome_fast.backends import triton_runtime as runtime

    driver = StandIn()
    triton.runtime.driver.set_active(driver)
    cpu = torch.device("cpu")
    with (
        mock.patch.object(runtime, "architecture", lambda index: "sm_90"),
        mock.patch.object(runtime, "multiprocessors", lambda index: 132),
        mock.patch.dict(runtime._settled, {cpu: (True, "a stand-in for a GPU")}),
        torch.no_grad(),
    ):
        cases = calls()
        samples: dict[str, list[float]] = {name: [] for name in cases}
        launches = {}
        for name, call in cases.items():
            call()
            driver.launches = 0
            call()
            launches[name] = driver.launches
        for _ in range(rounds):
            for name, call in cases.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                samples[name].append((time.perf_counter() - start) / CALLS)
    return [
        {
            "name": name,
            "launches": launches[name],
            "seconds": statistics.median(taken),
            "least_seconds": min(taken),
            "target": TARGET if "first" in name else None,
        }
        for name, taken in samples.items()
    ]


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench host-time") -> int:
    """Return 0, or 1 if a case misses its target."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help=f"of {CALLS} calls; default: 20")
    parser.add_argument("--out", type=Path, default=results.FOLDER / "host-time.json")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print(
            f"{prog}: TRITON_INTERPRET is set, and interpreted launches tell nothing; unset it",
            file=sys.stderr,
        )
        return 2
    cases = measure(arguments.rounds)
    results.save(arguments.out, {"schema": 1, **provenance.describe(), "host_time": cases})
    for case in cases:
        print(f"{case['name']}: {case['seconds'] * 1e6:.1f} us, {case['launches']} launches")
    return int(any(case["target"] and case["seconds"] > case["target"] for case in cases))
