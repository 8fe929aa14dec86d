"""One launch of a kernel, with everything that does not change from call to call.

Triton examines every argument at every launch: its type, its alignment, whether it is 1 or a
multiple of 16. That takes the host 20 to 30 us, and a model's blocks repeat the same launches in
every step. So a `Launch` keeps the compiled kernel and launches it directly, by Triton's
`compiled[grid](...)`.
"""

from __future__ import annotations

from typing import Any

from . import triton_runtime as runtime


class Launch:
    """A kernel whose parameters are pointers, `numbers` and `constants`, in this order.

    Args:
        kernel: `triton.jit` function.
        grid: number of programs along each axis.
        numbers: sizes and strides.
        constants: values of the compile-time parameters.
        options: launch options, such as `("num_warps", 8)`.
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
            aligned: True if all pointers are multiples of 16 bytes. Other pointers need other code.
            pointers: tensors, tensor descriptors, fp32 numbers or None. Dtypes, the blocks of
                descriptors and the places of None are the same in every call.
        """
        if aligned and self._compiled is not None:
            self._compiled[self.grid](*pointers, *self._rest)
            return
        compiled = self.kernel[self.grid](*pointers, *self._rest, **self.options)
        # The interpreter compiles nothing, and a kernel may still be compiling.
        if aligned and not runtime.interpreting() and hasattr(compiled, "packed_metadata"):
            self._compiled = compiled
