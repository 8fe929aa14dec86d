"""The operator on Triton: allocates, chooses grids and configurations, launches kernels/.

Paper matching with combine="nearest" is column scales and then, as the tuning table says, either
one launch in which programs own rows, or tiles and a push. Everything else is scales, tiles,
similarities, push. Nothing here waits for the device or measures anything, and inputs are taken
with the strides that they have; so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from typing import Any

import torch
from torch import Tensor

from ..kernels import tuning
from ..kernels.pairing import Pairing

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


# ---------------------------------------------------------------------------------------------
# Whether, and as what
# ---------------------------------------------------------------------------------------------
@functools.cache
def _interpreting() -> bool:
    """Whether the kernels are interpreted: settled when Triton first decorates them."""
    from triton.runtime import JITFunction

    from ..kernels.match import tile_kernel

    return not isinstance(tile_kernel, JITFunction)


@functools.cache
def _arch(index: int) -> str:
    """`"sm_90"`, `"gfx942"`, ... of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


# Answers of `available` that cannot change any more, as every call of the operator asks twice.
_settled: dict[torch.device, tuple[bool, str]] = {}


def available(device: torch.device | str) -> tuple[bool, str]:
    """Whether this backend can run on `device`, and the reason in words either way.

    Imports Triton only where the device leaves the question open. What TRITON_INTERPRET says counts
    until Triton has decorated the kernels.
    """
    device = torch.device(device)
    answer = _settled.get(device)
    if answer is None:
        answer = _examine(device)
        decorated = _interpreting.cache_info().currsize > 0
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
        interpreting = _interpreting()
    except Exception as error:  # a broken installation may fail in any way; the reason says how
        return False, f"Triton cannot be imported: {error}"
    if interpreting:
        return True, "Triton interprets its kernels with numpy (TRITON_INTERPRET is set): slow"
    if device.type == "cpu":
        return False, "TRITON_INTERPRET was set only after Triton had decorated the kernels"
    index = torch.cuda.current_device() if device.index is None else device.index
    return True, f"Triton compiles its kernels for {_arch(index)}"


def _require(x: Tensor) -> None:
    usable, reason = available(x.device)
    if not usable:
        raise RuntimeError(f"the triton backend cannot run on {x.device}: {reason}")
    if x.dtype not in _DTYPES:
        names = ", ".join(_DTYPES.values())
        raise ValueError(f"the triton backend takes {names}, got {x.dtype}")


# ---------------------------------------------------------------------------------------------
# Arguments of launches
# ---------------------------------------------------------------------------------------------
def _launch_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the device of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _plan(x: Tensor, M: int, pairing: Pairing) -> tuning.Plan:
    arch = tuning.INTERPRETED if _interpreting() else _arch(x.device.index)
    products = len(pairing.sources) * pairing.slots
    return tuning.plan(arch, _DTYPES[x.dtype], products, x.shape[1], M, x.shape[2])


def _programs(x: Tensor, config: tuning.Config, tasks: int) -> int:
    """How many programs share `tasks` tiles; few when interpreted, so that they do share."""
    multiprocessors = 3 if _interpreting() else _multiprocessors(x.device.index)
    return min(tasks, multiprocessors * config.RESIDENT)


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _reference_step(pairing: Pairing) -> int:
    """How many reference items further the next source item's first one is."""
    return pairing.references if pairing.per_item else 0


def _bytes(mask: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A boolean (rows, tokens) mask as bytes, without a copy, and its strides."""
    if mask is None:
        return None, 0, 0
    return mask.view(torch.uint8), mask.stride(0), mask.stride(1)


def _per_slot(value: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """`alpha` or `threshold` on the device of `x`, and its stride over the slots."""
    if value.device != x.device:
        # Known on the host: handed over as the argument of a fill, which needs no transfer.
        value = torch.full((), float(value), dtype=torch.float32, device=x.device)
    value = value.to(torch.float32)
    return value, value.stride(0) if value.numel() > 1 else 0


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte of `tensor` in memory and the byte after its last."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False
    (a_start, a_end), (b_start, b_end) = _span(a), _span(b)
    return a_start < b_end and b_start < a_end


def _same_view(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    )


def _descriptor(tokens: Tensor, rows: int, channels: int) -> Any:
    """A tensor descriptor with blocks (1, rows, channels), None where it cannot express `tokens`.

    Tensor maps need 16-byte aligned items and tokens, channels that follow each other, and items
    that do not interleave.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    items, length, width = tokens.shape
    stride_b, stride_n, stride_d = tokens.stride()
    if items == 1:
        stride_b = length * stride_n
    if length == 1:
        stride_n = stride_b
    aligned = all(stride * tokens.element_size() % 16 == 0 for stride in (stride_b, stride_n))
    if not aligned or tokens.data_ptr() % 16 or stride_d != 1:
        return None
    if stride_n < width or stride_b < length * stride_n or stride_b % stride_n:
        return None
    if max(stride_b, stride_n) * tokens.element_size() >= 2**40:
        return None
    strides = [stride_b, stride_n, stride_d]
    return TensorDescriptor(tokens, [items, length, width], strides, [1, rows, channels])


# ---------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------
def _scales(
    tokens: Tensor,
    mask: Tensor | None,
    plan: tuning.Plan,
    item_step: int = 1,
    keys: Tensor | None = None,
) -> Tensor:
    """Column scales (P, M) fp32 of tokens (P, M, D); only items 0, item_step, ... are written.

    The same launch empties `keys`.
    """
    from ..kernels.match import scale_kernel

    items, M, D = tokens.shape
    scale = torch.empty((items, M), dtype=torch.float32, device=tokens.device)
    mask, *mask_strides = _bytes(mask)
    scale_kernel[(_blocks(M, plan.scale.BLOCK_M), _blocks(items, item_step))](
        tokens,
        mask,
        scale,
        keys,
        M,
        D,
        item_step,
        0 if keys is None else keys.numel(),
        *tokens.stride(),
        *mask_strides,
        **plan.scale.meta("BLOCK_M", "BLOCK_K"),
    )
    return scale


def _reference_scales(
    reference: Tensor,
    mask: Tensor | None,
    pairing: Pairing,
    plan: tuning.Plan,
    keys: Tensor | None = None,
) -> Tensor:
    step = pairing.group_size if pairing.mode == "first" else 1
    return _scales(reference, mask, plan, step, keys)


def _tiles(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    official: bool,
    scale: Tensor,
    keys: Tensor,
    plan: tuning.Plan,
) -> None:
    """Raise `keys` (B, C, N), or (B, 1, N) for the best of all slots, to the best candidates."""
    from ..kernels.match import tile_kernel

    pairs = pairing.mode == "others"
    if pairs:
        products = pairing.groups * (pairing.group_size * (pairing.group_size - 1) // 2)
    else:
        products = len(pairing.sources) * pairing.slots
    config = plan.pairs if pairs else plan.tiles
    rows, columns = (reference, x) if official else (x, reference)
    N, M, D = x.shape[1], reference.shape[1], x.shape[2]
    tasks = products * _blocks(N, config.BLOCK_M) * _blocks(M, config.BLOCK_N)
    if tasks == 0:
        return
    row_descriptor = column_descriptor = None
    if config.DESCRIPTORS:
        row_descriptor = _descriptor(rows, config.BLOCK_M, config.BLOCK_K)
        column_descriptor = _descriptor(columns, config.BLOCK_N, config.BLOCK_K)
        if row_descriptor is None or column_descriptor is None:
            row_descriptor = column_descriptor = None
    tile_kernel[(_programs(x, config, tasks),)](
        rows,
        columns,
        row_descriptor,
        column_descriptor,
        scale,
        keys,
        N,
        M,
        D,
        pairing.slots,
        products,
        pairing.group_size,
        _reference_step(pairing),
        *rows.stride(),
        *columns.stride(),
        MODE=pairing.mode,
        OFFICIAL=official,
        PAIRS=pairs,
        UNION=keys.shape[1] != pairing.slots,
        INTERPRETED=_interpreting(),
        **config.meta("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP"),
        **({} if _interpreting() or torch.version.hip else config.cap()),
    )


def _match(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    reference_mask: Tensor | None,
    matching: str,
) -> tuple[Tensor, Tensor]:
    from ..kernels.match import resolve_kernel

    B, N, D = x.shape
    M = reference.shape[1]
    shape = (B, pairing.slots, N)
    similarity = torch.empty(shape, dtype=torch.float32, device=x.device)
    index = torch.empty(shape, dtype=torch.int64, device=x.device)
    if 0 in shape:
        return similarity, index
    official = matching == "official"
    plan = _plan(x, M, pairing)
    keys = torch.empty(shape, dtype=torch.int64, device=x.device)
    reference_scale = _reference_scales(reference, reference_mask, pairing, plan, keys)
    # The paper's matching needs no source scale before the walk; it does not read this argument.
    x_scale = _scales(x, None, plan) if official else reference_scale
    _tiles(x, reference, pairing, official, x_scale, keys, plan)
    resolve_kernel[(_blocks(N, plan.resolve.BLOCK_M), B)](
        x,
        reference,
        x_scale,
        reference_scale,
        keys,
        similarity,
        index,
        N,
        M,
        D,
        pairing.slots,
        pairing.group_size,
        _reference_step(pairing),
        *x.stride(),
        *reference.stride(),
        MODE=pairing.mode,
        OFFICIAL=official,
        **plan.resolve.meta("BLOCK_M", "BLOCK_K"),
    )
    return similarity, index


def match(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    reference_mask: Tensor | None,
    matching: str,
) -> tuple[Tensor, Tensor]:
    """Best reference token per source token and slot.

    Args:
        x: (B, N, D) fp32, bf16 or fp16, any strides.
        reference: (P, M, D), any strides; `x` itself unless `pairing.mode` is `"external"`.
        pairing: which source item meets which reference item, in C slots.
        reference_mask: (P, M) bool or None, True where a token may be matched.
        matching: `"paper"` or `"official"`.

    Returns:
        similarity (B, C, N) fp32 and index (B, C, N) int64; -inf and -1 where there is no match.

    Raises:
        ValueError: another dtype. RuntimeError: Triton cannot run on the device of `x`.
    """
    _require(x)
    with _launch_device(x):
        return _match(x, reference, pairing, reference_mask, matching)


def guide(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    alpha: Tensor,
    threshold: Tensor,
    reference_mask: Tensor | None,
    movable: Tensor | None,
    matching: str,
    combine: str,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Match, threshold and push; the result is written to `out`.

    Args:
        x, reference, pairing, reference_mask, matching: as for `match`.
        alpha, threshold: fp32, shape () or (C,).
        movable: (B, N) bool or None, True where a source token may move.
        combine: `"nearest"` (S = 1) or `"sum"` (S = C).
        out: (B, N, D), any strides, written completely; or `x` for in-place, where only tokens
            that move are written.

    Returns:
        similarity (B, S, N) fp32, -inf where there is no match; and pushed (B, S, N) int64,
        slot * M + token where a token was pushed, else -1.

    Raises:
        ValueError: another dtype. RuntimeError: Triton cannot run on the device of `x`.
    """
    _require(x)
    with _launch_device(x):
        target = out
        # Group heads are never written, so "first" has no hazard; other references that are also
        # outputs would be read by one program after another has moved them.
        if pairing.mode != "first" and _overlap(out, reference):
            target = torch.empty_like(x)
        inplace = _same_view(target, x)
        results = _guide(
            x,
            reference,
            pairing,
            alpha,
            threshold,
            reference_mask,
            movable,
            matching,
            combine,
            target,
            inplace,
        )
        if target is not out:
            out.copy_(target)
        return results


def _guide(
    x: Tensor,
    reference: Tensor,
    pairing: Pairing,
    alpha: Tensor,
    threshold: Tensor,
    reference_mask: Tensor | None,
    movable: Tensor | None,
    matching: str,
    combine: str,
    out: Tensor,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """`guide` where `out` shares no memory with a reference that moves."""
    B, N, D = x.shape
    M = reference.shape[1]
    total = combine == "sum"
    shape = (B, pairing.slots if total else 1, N)
    pushed = torch.empty(shape, dtype=torch.int64, device=x.device)
    if N == 0:
        return torch.empty(shape, dtype=torch.float32, device=x.device), pushed
    alpha, stride_alpha = _per_slot(alpha, x)
    threshold, stride_threshold = _per_slot(threshold, x)
    movable, *movable_strides = _bytes(movable)
    sizes = (N, M, D, pairing.slots, pairing.group_size, _reference_step(pairing))
    strides = (
        *x.stride(),
        *reference.stride(),
        *out.stride(),
        stride_alpha,
        stride_threshold,
        *movable_strides,
    )
    constants = {"MODE": pairing.mode, "INPLACE": inplace, "INTERPRETED": _interpreting()}
    plan = _plan(x, M, pairing)

    if matching == "paper" and not total:
        from ..kernels.push import finish_kernel
        from ..kernels.rows import rows_kernel

        similarity = torch.empty(shape, dtype=torch.float32, device=x.device)
        tail = (alpha, threshold, movable, out, similarity, pushed, *sizes, *strides)
        # A key of the union of all slots has 31 bits for slot and token.
        if plan.kind == "rows" or pairing.slots * M >= 2**31:
            scale = _reference_scales(reference, reference_mask, pairing, plan)
            rows_kernel[(_blocks(N, plan.rows.BLOCK_M), B)](
                x,
                reference,
                scale,
                *tail,
                **constants,
                **plan.rows.meta("BLOCK_M", "BLOCK_N", "BLOCK_K"),
            )
            return similarity, pushed
        keys = torch.empty(shape, dtype=torch.int64, device=x.device)
        scale = _reference_scales(reference, reference_mask, pairing, plan, keys)
        if plan.kind == "coarse":
            from .triton_coarse import raise_keys

            raise_keys(x, reference, pairing, scale, keys, plan)
        else:
            _tiles(x, reference, pairing, False, scale, keys, plan)
        finish_kernel[(_blocks(N, plan.finish.BLOCK_M), B)](
            x,
            reference,
            scale,
            keys,
            *tail,
            **constants,
            **plan.finish.meta("BLOCK_M", "BLOCK_K"),
        )
        return similarity, pushed

    from ..kernels.push import push_kernel

    match_similarity, match_index = _match(x, reference, pairing, reference_mask, matching)
    if total:
        similarity = match_similarity
    else:
        similarity = torch.empty(shape, dtype=torch.float32, device=x.device)
    push_kernel[(_blocks(N, plan.push.BLOCK_M), B)](
        x,
        reference,
        match_similarity,
        match_index,
        alpha,
        threshold,
        movable,
        out,
        similarity,
        pushed,
        *sizes,
        *strides,
        SUM=total,
        **constants,
        **plan.push.meta("BLOCK_M", "BLOCK_K"),
    )
    return similarity, pushed
