"""Count of the operators that a call runs; it does not depend on how busy the machine is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Counter of the operators that run, and of the elements of memory that each allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.allocated: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.calls[name] += 1
        given = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.allocated[name, tensor.numel()] += 1
        return result


def operators(call: Callable[[], object]) -> Operators:
    """Count the operators of one call."""
    with Operators() as counted:
        call()
    return counted
