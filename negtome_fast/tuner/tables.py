"""Tuning table of an architecture: merge measured entries into it, and write it in one step."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..files import write_atomically
from ..kernels import tuning
from ..kernels.tuning import Problem
from ..provenance import version_of


def machine(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit of a measurement."""
    import subprocess

    def output(*command: str) -> str | None:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        lines = done.stdout.strip().splitlines()
        return lines[0] if done.returncode == 0 and lines else None

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "versions": {name: version_of(name) for name in ("torch", "triton", "negtome-fast")},
        "commit": output("git", "rev-parse", "HEAD"),
    }


def merge(table: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """`table` with `entry` instead of entries of the same problem; other entries stay."""

    def key(some: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(some[name] for name in Problem._fields)

    kept = [other for other in table["entries"] if key(other) != key(entry)]
    # Measured entries come first, because the first of equally near entries serves.
    entries = sorted([entry, *kept], key=lambda some: not some["measured"])
    return {**table, "entries": entries}


def with_measured(
    table: dict[str, Any], entry: dict[str, Any], facts: dict[str, Any]
) -> dict[str, Any]:
    """`table` with a measured entry; both record the machine that measured it."""
    measured = {**table, "machine": facts, "note": "measured"}
    return merge(measured, {**entry, "machine": facts})


def text_of(table: dict[str, Any]) -> str:
    """A table as JSON with a line for each entry."""
    head = json.dumps({k: v for k, v in table.items() if k != "entries"}, indent=1)
    lines = ",\n".join("  " + json.dumps(entry) for entry in table["entries"])
    return f'{head[:-2]},\n "entries": [\n{lines}\n ]\n}}\n'


def write(path: Path, table: dict[str, Any]) -> None:
    """Replace the file in one step, so that no reader meets half of it.

    Raises:
        ValueError: the table has a fault.
        OSError: the folder cannot be written to.
    """
    tuning.check(table, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text_of(table).encode())
    tuning.forget()


def start_table(path: Path, arch: str) -> dict[str, Any]:
    """Table that results are merged into: that of the file, else the one that serves `arch`."""
    table = tuning.load(path if path.is_file() else tuning.table_path(arch))
    if table["arch"] != arch:
        entries = [{**entry, "measured": False} for entry in table["entries"]]
        table = {**table, "arch": arch, "machine": None, "entries": entries}
    return table
