"""Provenance of a result: machine, versions, commit."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def version_of(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        if found:
            return found.group(1).strip()
    name = _output("sysctl", "-n", "machdep.cpu.brand_string") if sys.platform == "darwin" else None
    return name or platform.processor() or platform.machine()


def commit() -> dict[str, Any]:
    """The commit of the checkout and the number of files that differ; None without a checkout."""
    if not (ROOT / ".git").exists():  # The environment may lie inside another repository.
        return {"commit": None, "changed_files": None}
    changed = _output("git", "status", "--porcelain")
    return {
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed_files": None if changed is None else len(changed.splitlines()),
    }


def gpu() -> dict[str, Any] | None:
    """Name, capability, memory and driver of the current CUDA device; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def describe() -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat a measurement."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **commit(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": gpu(),
        "versions": {
            "python": platform.python_version(),
            **{name: version_of(name) for name in ("torch", "triton", "numpy", "negtome-fast")},
        },
    }


def slug(machine: dict[str, Any]) -> str:
    """A short name for files: the GPU, or the processor and its threads."""
    name = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}-{machine['threads']}t"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
