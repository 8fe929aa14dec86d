"""Division of non-negative int32 numbers by a divisor that a whole launch shares.

    n // d = (n * m) >> (31 + l)   where  l = ceil(log2 d),  m = ceil(2^(31 + l) / d)

A division by a runtime number costs about 25 instructions in every tile; this costs a few. It is
exact for 0 <= n < 2^31: m * d exceeds 2^(31 + l) by less than d <= 2^l, so n * m / 2^(31 + l)
exceeds n / d by less than 1 / d.

Source: Granlund and Montgomery, "Division by invariant integers using multiplication", PLDI 1994.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl


@functools.lru_cache(maxsize=4096)
def reciprocal(divisor: int) -> int:
    """Code of a divisor in [1, 2^31) for `quotient`: m and the shift 31 + l in one integer.

    Raises:
        ValueError: the divisor is out of range.
    """
    if not 1 <= divisor < 2**31:
        raise ValueError(f"divisor must be in [1, 2^31), got {divisor}")
    shift = 31 + (divisor - 1).bit_length()
    return -(-(1 << shift) // divisor) << 6 | shift


@triton.jit
def quotient(number, code):
    """`number // divisor` of non-negative int32 numbers; `code` is `reciprocal(divisor)`."""
    # The product of two unsigned 32-bit numbers is one instruction.
    wide = tl.cast(tl.cast(number, tl.uint32), tl.uint64)
    factor = tl.cast(tl.cast(code >> 6, tl.uint32), tl.uint64)
    return tl.cast((wide * factor) >> tl.cast(code & 63, tl.uint64), tl.int32)
