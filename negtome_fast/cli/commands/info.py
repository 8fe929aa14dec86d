"""`negtome-fast info`: versions, devices, backends, and which of them would be used and why."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("info", help="versions, devices, and the backend that is used")
    parser.add_argument("--kernels", action="store_true", help="compile every kernel and report")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> int:
    if options.kernels:
        from ...tuner import compile_report

        rows = compile_report.report()
        print(json.dumps(rows, indent=1) if options.json else compile_report.table(rows))
        return int(any(compile_report.problems(row) for row in rows))
    print(json.dumps(collect(), indent=1) if options.json else text())
    return 0


def devices() -> list[torch.device]:
    """Return the CPU and every accelerator that torch sees."""
    import torch

    found = [torch.device("cpu")]
    found += [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def collect() -> dict[str, Any]:
    """Return all facts as plain values."""
    import torch

    from ... import __version__, ops
    from ...backends import coarse, triton_runtime
    from ...provenance import version_of

    rows = []
    for device in devices():
        ready, reason = triton_runtime.available(device)
        try:
            auto = ops.resolve_backend("auto", device, torch.bfloat16)
        except RuntimeError as error:
            auto = f"nothing: {error}"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
        rows.append(
            {
                "device": str(device),
                "name": name or platform.machine(),
                "triton": ready,
                "triton_reason": reason,
                "auto": auto,
                "int8_products": device.type == "cpu" and coarse.has_int8_products(),
            }
        )
    return {
        "negtome-fast": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {package: version_of(package) for package in PACKAGES},
        "threads": torch.get_num_threads(),
        "override": os.environ.get(ops.BACKEND_VARIABLE),
        "devices": rows,
    }


def text() -> str:
    """Return all facts as lines to read."""
    from ...ops import BACKEND_VARIABLE

    facts = collect()
    lines = [f"negtome-fast {facts['negtome-fast']}, Python {facts['python']}, {facts['system']}"]
    packages = (f"{name} {found or 'not installed'}" for name, found in facts["packages"].items())
    lines.append(", ".join(packages))
    if not any(row["device"].startswith("cuda") for row in facts["devices"]):
        lines.append("GPU: none that torch can use")
    for row in facts["devices"]:
        lines.append(f'{row["device"]} ({row["name"]}): backend "auto" uses {row["auto"]}')
        state = "ready" if row["triton"] else "not used"
        lines.append(
            f"  triton: {state}" + (f", {row['triton_reason']}" if row["triton_reason"] else "")
        )
        products = ", large products in int8 first" if row["int8_products"] else ""
        lines.append(f"  torch: ready (chunked, linear memory{products})")
    if facts["override"]:
        lines.append(f'{BACKEND_VARIABLE}={facts["override"]} decides what "auto" means')
    return "\n".join(lines)
