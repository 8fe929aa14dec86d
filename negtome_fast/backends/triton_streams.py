"""A second CUDA stream, whose work may overlap with later work of the current stream."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class SideStream:
    """Context that runs launches on a second stream, each after earlier work of the current one.

    On exit, the current stream waits for the second one, so that nothing launched or freed later
    interferes with its work. Streams are joined by events alone: a CUDA graph captures both. Each
    device has one second stream. On a CPU everything runs in order.

    Args:
        x: a tensor on the current device.
    """

    def __init__(self, x: Tensor) -> None:
        self._used = False
        self._main = torch.cuda.current_stream(x.device) if x.is_cuda else None
        self._side = _side_stream(x.device) if x.is_cuda else None

    def following(self) -> AbstractContextManager[Any]:
        """Context of launches on the second stream, after earlier work of the current one."""
        if self._side is None or self._main is None:
            return nullcontext()
        self._side.wait_stream(self._main)
        self._used = True
        return torch.cuda.stream(self._side)

    def __enter__(self) -> SideStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After a failure, too: the current stream reuses memory that the second one has in use.
        if self._used and self._main is not None and self._side is not None:
            self._main.wait_stream(self._side)
