"""Program of test_tuner_launches.py: compile launches for a GPU that is not there.

Triton sees a device of sm_90, and the backend takes tokens on the CPU for tokens on it. Nothing is
launched. Prints the rows that were compiled in parallel, and whether each launch then found its
code in the cache.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import bench  # noqa: F401, finds the kernels in a checkout that is not installed
from negtome_fast.backends import triton_runtime as runtime
from negtome_fast.functional import guide_tokens, negtome
from negtome_fast.kernels.tuning import Config
from negtome_fast.tuner import launches
from negtome_fast.tuner.run import launch
from negtome_fast.tuner.space import TokenShape

SHAPE = TokenShape(4, 64, 128)


class Device:
    """The part of Triton's driver that a launch calls before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def pretend() -> None:
    driver.set_active(Device())
    runtime.available = lambda device: (True, "pretended")
    runtime.architecture = lambda index: "sm_90"
    runtime.multiprocessors = lambda index: 132


def operator(shape: TokenShape, reference: Any) -> object:
    x = torch.zeros(shape.items, shape.tokens, shape.channels, dtype=torch.bfloat16)
    return negtome(x, reference, groups=shape.groups, backend="triton")


def checked(shape: TokenShape, reference: Any) -> object:
    """The call that is compared with the oracle before `operator` is timed."""
    x = torch.zeros(shape.items, shape.tokens, shape.channels, dtype=torch.bfloat16)
    chosen = {"alpha": 0.9, "threshold": 0.65, "backend": "triton"}
    return guide_tokens(x, reference, groups=shape.groups, **chosen)


def noted(keys: Any, call: Any) -> list[str]:
    """Notes of the launches of all configurations."""
    notes: list[str] = []
    for key in keys:
        with launches.noting(notes):
            launch(key, SHAPE, call)
    return notes


def found_in_cache(job: Any) -> list[bool]:
    """For each kernel that a launch compiles: True if Triton found it in its cache on disk."""
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    with launches.not_launching():
        job()
    return hits


def main() -> None:
    pretend()
    keys = [(kernel, "bfloat16", Config(*fields)) for kernel, fields in json.load(sys.stdin)]
    jobs = [(key, partial(launch, key, SHAPE, operator)) for key in keys]
    notes = noted(keys, operator)
    same = set(notes) == set(noted(keys, checked))
    rows = launches.compile_all("sm_90", jobs)
    compiled = len({path.parent.name for path in Path(sys.argv[1]).glob("*/*.cubin")})
    hits = [found_in_cache(job) for _, job in jobs]
    found = {"rows": rows, "hits": hits, "notes": notes, "same": same, "compiled": compiled}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
