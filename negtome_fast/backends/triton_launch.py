"""One launch of a kernel with everything that does not change from call to call.

Triton examines every argument at every launch: its type, its alignment, whether it is 1 or a
multiple of 16. That takes the host 20 to 30 us, and a model's blocks launch the same again in
every step. So a `Launch` keeps the compiled kernel and launches it as such, which Triton offers as
`compiled[grid](...)`.
"""

from __future__ import annotations

from typing import Any

from . import triton_runtime as runtime


class Launch:
    """A `triton.jit` function whose parameters are pointers, `numbers`, `constants`, in this order.

    Args:
        kernel: the function.
        grid: programs along each axis.
        numbers: sizes and strides.
        constants: of compile time.
        options: of the launch, such as `("num_warps", 8)`.
    """

    __slots__ = ("_compiled", "_rest", "grid", "kernel", "options")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int],
        numbers: tuple[int, ...],
        constants: tuple[Any, ...],
        options: tuple[tuple[str, int], ...],
    ) -> None:
        self.kernel, self.grid, self.options = kernel, (*grid, 1), dict(options)
        self._rest = (*numbers, *constants)
        self._compiled: Any = None

    def __call__(self, aligned: bool, *pointers: Any) -> None:
        """Launch on the current stream.

        Args:
            aligned: whether all pointers are multiples of 16 bytes. Others compile other code.
            pointers: tensors of the same dtypes in every call, tensor descriptors of the same
                blocks, None in the same places, or fp32 numbers.
        """
        if aligned and self._compiled is not None:
            self._compiled[self.grid](*pointers, *self._rest)
            return
        compiled = self.kernel[self.grid](*pointers, *self._rest, **self.options)
        # Neither of the interpreter, nor one that is still being compiled.
        if aligned and not runtime.interpreting() and hasattr(compiled, "packed_metadata"):
            self._compiled = compiled
