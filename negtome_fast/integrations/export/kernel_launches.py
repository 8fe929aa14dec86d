"""The kernel launches of one exported call, as `backends.triton_backend` makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...kernels import tuning
from .operator import Operator


@dataclass(frozen=True)
class KernelLaunch:
    """One launch of a call: `name` in header and files, `kernel` of `tuning.KERNELS`."""

    name: str
    kernel: str
    config: tuning.Config
    constants: dict[str, Any]
    grid: tuple[str, str]


def launches(operator: Operator) -> list[KernelLaunch]:
    """The launches of one call in their order."""
    plan = operator.plan()
    official = operator.matching == "official"
    mode: dict[str, Any] = {"MODE": operator.reference}
    push: dict[str, Any] = {
        **mode,
        "NUMBERS": False,
        "INPLACE": operator.inplace,
        "INTERPRETED": False,
    }
    if not operator.source_mask:
        push["source_mask_ptr"] = None

    # Scales; the same launch empties the keys where there are any
    scale: dict[str, Any] = {} if operator.reference_mask else {"mask_ptr": None}
    if plan.kind == "fused":
        scale["key_ptr"] = None
    grid = f"ceil(M / {plan.scale.BLOCK_M})", "ceil(P / item_step)"
    found = [_launch(plan, "scale", "scale", "BLOCK_M BLOCK_K", grid, **scale)]
    if plan.kind == "fused":
        return [*found, _launch(plan, "rows", "fused", "BLOCK_M BLOCK_N BLOCK_K", **push)]

    # Match by tiles, then push
    if official:
        nothing: dict[str, Any] = {"mask_ptr": None, "key_ptr": None}
        found.append(_launch(plan, "source_scale", "scale", "BLOCK_M BLOCK_K", **nothing))
    found.append(_tiles(plan, operator))
    blocks = "BLOCK_M BLOCK_K"
    if operator.resolves:
        found.append(_launch(plan, "resolve", "resolve", blocks, **mode, OFFICIAL=official))
        total = operator.combine == "sum"
        found.append(_launch(plan, "push", "push", blocks, **push, SUM=total))
    else:
        found.append(_launch(plan, "finish", "push_from_keys", blocks, **push))
    return found


def _launch(
    plan: tuning.Plan,
    name: str,
    kernel: str,
    blocks: str,
    grid: tuple[str, str] | None = None,
    **constants: Any,
) -> KernelLaunch:
    """A launch with the named block sizes of its configuration; default grid: rows of items."""
    config = plan.configuration(kernel)
    fields = config._asdict()
    values = {block: fields[block] for block in blocks.split()} | constants
    return KernelLaunch(name, kernel, config, values, grid or (f"ceil(N / {config.BLOCK_M})", "B"))


def _tiles(plan: tuning.Plan, operator: Operator) -> KernelLaunch:
    """The launch that matches by tiles: as many programs as the device holds, or as tiles."""
    kernel = "pairs" if operator.reference == "others" else "tiles"
    config = plan.configuration(kernel)
    programs = (
        f"min(products * ceil(N / {config.BLOCK_M}) * ceil(M / {config.BLOCK_N}), "
        f"multiprocessors * {config.CTAS_PER_SM})"
    )
    return _launch(
        plan,
        "tiles",
        kernel,
        "BLOCK_M BLOCK_N BLOCK_K GROUP_M",
        (programs, "1"),
        row_descriptor=None,
        column_descriptor=None,
        MODE=operator.reference,
        OFFICIAL=operator.matching == "official",
        PAIRS=kernel == "pairs",
        UNION=not operator.resolves,
        INTERPRETED=False,
        FLATTEN=False,
    )
