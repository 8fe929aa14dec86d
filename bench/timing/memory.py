"""Peak memory of one call beyond its input and its result.

On CUDA the allocator counts it. On a CPU the call runs in a fresh process, and the operating system
counts the peak of its resident set. This sees every allocation, which no hook in Python or torch
does. The counter is reset after the input is made.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .._path import ROOT
from ..compared.shapes import Shape, parse_shape, random_tokens

MIB = 2**20
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEMORY = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the device; None if the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    if not MEMORY.exists():
        return None
    for line in MEMORY.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def cuda_extra_bytes(function: Callable[[Tensor], Tensor], x: Tensor, result: bool) -> int:
    """Peak of the CUDA allocator over one call, minus the memory before it and the result."""
    function(x)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = function(x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - (y.nbytes if result else 0)


def cpu_extra_bytes(candidate: str, shape: Shape, dtype: str, threads: int) -> int | None:
    """Peak of a fresh process over one call on a CPU; None if the system does not count peaks."""
    if not RESET.exists():
        return None
    arguments = [candidate, str(shape), dtype, str(threads)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.timing.memory", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return int(json.loads(done.stdout.splitlines()[-1])["extra_bytes"])


def status_bytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


def _main(candidate: str, shape_text: str, dtype_name: str, threads: str) -> None:
    from ..compared.candidates import CANDIDATES

    torch.set_num_threads(int(threads))
    shape, dtype = parse_shape(shape_text), getattr(torch, dtype_name)
    chosen = CANDIDATES[candidate]
    # A small call first: libraries, threads and their workspaces do not count as extra memory.
    small = Shape("small", shape.items, 64, shape.channels, shape.groups)
    chosen.prepare(small, small_tokens := random_tokens(small, dtype, "cpu"))(small_tokens)
    x = random_tokens(shape, dtype, "cpu")
    function = chosen.prepare(shape, x)
    if chosen.compiles:
        function(x)

    gc.collect()
    # Freed memory that the allocator still holds would hide an allocation.
    ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5")
    before = status_bytes("VmRSS")
    y = function(x)
    extra = status_bytes("VmHWM") - before - (y.nbytes if chosen.returns_result else 0)
    print(json.dumps({"extra_bytes": max(extra, 0)}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
