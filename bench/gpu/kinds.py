"""`python -m bench.gpu.kinds DEVICE FOLDER KIND...`: checks kinds of kernels, in this process.

`FOLDER/<kind>.json` is replaced before and after each check, so that it names the check in which
the process died. Exit code: 0 all right, 1 a check failed, 3 the device was lost.
"""

from __future__ import annotations

import faulthandler
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..results import save
from ..timing.launches import KINDS
from .checks import checks, way

CHECK_SECONDS = {"cuda": 45.0, "cpu": 900.0}
"""Device -> seconds after which a check ends the process: its kernel hangs."""


def lost(device: str) -> str | None:
    """Reason why this process cannot use the device any more, or None."""
    if device != "cuda":
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def checked(name: str, check: Callable[[], None], seconds: float) -> dict[str, Any]:
    """Run one check for at most `seconds`, and keep the whole traceback of an error."""
    started = time.perf_counter()
    found: dict[str, Any] = {"check": name, "passed": True}
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        check()
    except Exception as error:
        text = traceback.format_exc()
        print(f"FAILED {name}\n{text}", flush=True)
        said = f"{type(error).__name__}: {error}"
        found |= {"passed": False, "error": said, "traceback": text}
    finally:
        faulthandler.cancel_dump_traceback_later()
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def check_kind(kind: str, device: str, path: Path) -> int:
    """Write the results of all checks of a kind, and return the exit code."""
    result: dict[str, Any] = {"kind": kind, "complete": False, "checks": [], "running": "start"}
    save(path, result)
    with way(kind):
        for name, check in checks(kind, device):
            save(path, result | {"running": name})
            result["checks"].append(checked(name, check, CHECK_SECONDS[device]))
            save(path, result)
            reason = None if result["checks"][-1]["passed"] else lost(device)
            if reason:
                save(path, result | {"lost": reason})
                print(f"the device is lost to this process: {reason}", flush=True)
                return 3
    save(path, result | {"complete": True, "running": None})
    good = sum(check["passed"] for check in result["checks"])
    print(f"{kind}: {good} of {len(result['checks'])} checks passed", flush=True)
    return int(good < len(result["checks"]))


def file_of(kind: str) -> str:
    return f"{kind.replace(' ', '-')}.json"


def main(argv: Sequence[str]) -> int:
    """Check kinds and return the worst of their exit codes."""
    device, folder, *names = argv
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        print(f"unknown {', '.join(unknown)}; known: {', '.join(KINDS)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    code = 0
    for kind in names:
        code = max(code, check_kind(kind, device, Path(folder) / file_of(kind)))
        if code == 3:
            break
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
