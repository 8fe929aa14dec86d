"""A second stream for work that may run beside what follows it on the current one."""

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
    """Runs launches on a second stream, each after what the current stream was given before it.

    On leaving, the current stream waits for the second one: nothing that is launched or freed later
    can meet its work. Streams are joined by events alone, so that a CUDA graph captures both. A
    device has one second stream. On a CPU everything runs in order.

    Args:
        x: a tensor of the current device.
    """

    def __init__(self, x: Tensor) -> None:
        self._used = False
        self._main = torch.cuda.current_stream(x.device) if x.is_cuda else None
        self._side = _side_stream(x.device) if x.is_cuda else None

    def following(self) -> AbstractContextManager[Any]:
        """Context of launches on the second stream, behind what the current stream has now."""
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
        # After a failure, too: memory that the second stream uses goes back to the current one.
        if self._used and self._main is not None and self._side is not None:
            self._main.wait_stream(self._side)
