"""Devices that the Triton kernels can run on, and their properties."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@functools.cache
def interpreting() -> bool:
    """Return True if the kernels are interpreted. Triton decides when it decorates them."""
    from triton.runtime import JITFunction

    from ..kernels.match import tiled_match_kernel

    return not isinstance(tiled_match_kernel, JITFunction)


@functools.cache
def architecture(index: int) -> str:
    """`"sm_90"`, `"gfx942"`, ... of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


# Answers of `available` that cannot change any more: every call of the operator asks twice.
_settled: dict[torch.device, tuple[bool, str]] = {}


def available(device: torch.device | str) -> tuple[bool, str]:
    """Return True if this backend can run on `device`, else False; and the reason in words.

    Triton is imported only if the device leaves the question open. A change of TRITON_INTERPRET
    counts until Triton has decorated the kernels.
    """
    device = torch.device(device)
    answer = _settled.get(device)
    if answer is None:
        answer = _examine(device)
        decorated = interpreting.cache_info().currsize > 0
        if decorated if device.type == "cpu" else device.index is not None:
            _settled[device] = answer
    return answer


def _examine(device: torch.device) -> tuple[bool, str]:
    if device.type not in ("cpu", "cuda"):
        return False, f"Triton kernels do not run on {device.type} tensors"
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    requested = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    if device.type == "cpu" and not requested:
        return False, "Triton needs a GPU; on the CPU it only interprets, under TRITON_INTERPRET=1"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return False, "PyTorch finds no GPU"
        if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
            return False, "Triton kernels need compute capability 8.0 (Ampere) or newer"
    try:
        interpreted = interpreting()
    except Exception as error:  # A broken installation may fail in any way.
        return False, f"Triton cannot be imported: {error}"
    if interpreted:
        return True, "Triton interprets its kernels with numpy (TRITON_INTERPRET is set): slow"
    if device.type == "cpu":
        return False, "TRITON_INTERPRET was set only after Triton had decorated the kernels"
    index = torch.cuda.current_device() if device.index is None else device.index
    return True, f"Triton compiles its kernels for {architecture(index)}"


def require(x: Tensor) -> None:
    """Raise `RuntimeError` or `ValueError` if this backend cannot serve `x`."""
    usable, reason = available(x.device)
    if not usable:
        raise RuntimeError(f"the triton backend cannot run on {x.device}: {reason}")
    if x.dtype not in DTYPES:
        names = ", ".join(DTYPES.values())
        raise ValueError(f"the triton backend takes {names}, got {x.dtype}")


_nothing = contextlib.nullcontext()


def launch_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context in which the device of `x` is the current one, on which Triton launches."""
    if not x.is_cuda or torch.cuda.current_device() == x.device.index:
        return _nothing
    return torch.cuda.device(x.device)
