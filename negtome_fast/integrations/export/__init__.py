"""Kernels compiled ahead of time, for programs without Python: `negtome-fast export`.

One folder is one operator for one target: the kernels of a call as cubin or hsaco files, a C header
that checks a problem and launches it through the driver API, and a description in JSON. No GPU is
needed. docs/export.md says how to use them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from ...kernels import aot, tuning
from ...pairing import Mode, Pairing

#: Short names of the command line, and those of tuning tables.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
REFERENCES = ("first", "others", "external")
KINDS = ("auto", "rows", "tiles")
HEADER, DESCRIPTION = "negtome.h", "negtome.json"
SCHEMA = 1


@dataclass(frozen=True)
class Operator:
    """What is compiled; choices that `negtome_fast.negtome` makes at run time are fixed here.

    Attributes:
        target: `"sm_80"`, `"sm_89"`, `"sm_90"`, `"sm_100"` or `"gfx942"`.
        dtype: `"bfloat16"`, `"float16"`, `"float32"` or `"bf16"`, `"fp16"`, `"fp32"`.
        channels: the configuration is chosen for these D. Kernels run with any other D, or with any
            multiple of 16 where this one is a multiple of 16.
        reference: `"first"`, `"others"`, or `"external"` for a tensor of references.
        matching, combine: as in `negtome_fast.negtome`.
        inplace: write into `x`, only the tokens that move; not with `reference="others"`.
        reference_mask, source_mask: whether calls hand over these masks.
        kind: `"tiles"`, `"rows"` (match and push in one launch), or `"auto"`: as the tuning table
            says for `items` of `tokens`.

    Raises:
        ValueError: says which of them cannot be, and what can.
    """

    target: str
    dtype: str
    channels: int
    reference: str = "first"
    matching: str = "paper"
    combine: str = "nearest"
    inplace: bool = False
    reference_mask: bool = False
    source_mask: bool = False
    kind: str = "auto"
    items: int = 4
    tokens: int = 4096

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", DTYPES.get(self.dtype, self.dtype))
        for name, known in (
            ("target", tuple(aot.TARGETS)),
            ("dtype", tuning.DTYPES),
            ("reference", REFERENCES),
            ("matching", ("paper", "official")),
            ("combine", ("nearest", "sum")),
            ("kind", KINDS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name in ("channels", "items", "tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.reference != "external" and self.items < 2:
            raise ValueError(f"reference {self.reference!r} needs at least 2 items")
        if self.inplace and self.reference == "others":
            raise ValueError("inplace cannot serve others: tokens that moved would be references")
        if self.kind == "rows" and self.resolves:
            raise ValueError(
                'kind="rows" is for matching="paper" with combine="nearest"; use kind="tiles"'
            )

    @property
    def resolves(self) -> bool:
        """Whether matches of all slots are written out before the push."""
        return self.matching == "official" or self.combine == "sum"

    @property
    def divisor(self) -> int:
        """What channels and strides must be multiples of."""
        return 1 if self.channels % 16 else 16

    def plan(self) -> tuning.Plan:
        """The tuning table's, of the given kind, with pointers instead of tensor descriptors."""
        pairing = Pairing(cast(Mode, self.reference), self.items)
        products = len(pairing.sources) * pairing.slots
        plan = tuning.plan(
            self.target, self.dtype, products, self.tokens, self.tokens, self.channels
        )
        kind = "tiles" if self.resolves else plan.kind if self.kind == "auto" else self.kind
        if kind == "coarse":  # more launches than are exported; tiles choose the same tokens
            kind = "tiles"
        return plan._replace(
            kind=kind,
            tiles=plan.tiles._replace(DESCRIPTORS=0),
            pairs=plan.pairs._replace(DESCRIPTORS=0),
        )


@dataclass(frozen=True)
class Launch:
    """One launch of a call: `name` in header and files, `kernel` of `tuning.KERNELS`."""

    name: str
    kernel: str
    config: tuning.Config
    constants: dict[str, Any]
    grid: tuple[str, str]


def launches(operator: Operator) -> list[Launch]:
    """The launches of one call in their order, as `backends.triton_backend` makes them."""
    plan = operator.plan()
    official, total = operator.matching == "official", operator.combine == "sum"
    mode = {"MODE": operator.reference}
    found = []

    def add(name: str, kernel: str, blocks: str, grid: tuple[str, str], **constants: Any) -> None:
        config = plan.configuration(kernel)
        fields = config._asdict()
        values = {block: fields[block] for block in blocks.split()} | constants
        found.append(Launch(name, kernel, config, values, grid))

    def rows_of(kernel: str) -> tuple[str, str]:
        return f"ceil(N / {plan.configuration(kernel).BLOCK_M})", "B"

    push = {**mode, "NUMBERS": False, "INPLACE": operator.inplace, "INTERPRETED": False}
    if not operator.source_mask:
        push["source_mask_ptr"] = None
    scale: dict[str, Any] = {} if operator.reference_mask else {"mask_ptr": None}
    if plan.kind == "rows":
        scale["key_ptr"] = None
    grid = f"ceil(M / {plan.scale.BLOCK_M})", "ceil(P / item_step)"
    add("scale", "scale", "BLOCK_M BLOCK_K", grid, **scale)
    if plan.kind == "rows":
        add("rows", "rows", "BLOCK_M BLOCK_N BLOCK_K", rows_of("rows"), **push)
        return found

    if official:
        nothing = {"mask_ptr": None, "key_ptr": None}
        add("source_scale", "scale", "BLOCK_M BLOCK_K", rows_of("scale"), **nothing)
    pairs = operator.reference == "others"
    config = plan.pairs if pairs else plan.tiles
    programs = (
        f"min(products * ceil(N / {config.BLOCK_M}) * ceil(M / {config.BLOCK_N}), "
        f"multiprocessors * {config.CTAS_PER_SM})"
    )
    add(
        "tiles",
        "pairs" if pairs else "tiles",
        "BLOCK_M BLOCK_N BLOCK_K GROUP_M",
        (programs, "1"),
        row_descriptor=None,
        column_descriptor=None,
        **mode,
        OFFICIAL=official,
        PAIRS=pairs,
        UNION=not operator.resolves,
        INTERPRETED=False,
        FLATTEN=False,
    )
    if operator.resolves:
        add("resolve", "resolve", "BLOCK_M BLOCK_K", rows_of("resolve"), **mode, OFFICIAL=official)
        add("push", "push", "BLOCK_M BLOCK_K", rows_of("push"), **push, SUM=total)
    else:
        add("finish", "finish", "BLOCK_M BLOCK_K", rows_of("finish"), **push)
    return found


def export(operator: Operator, folder: Path | str, assembly: bool = False) -> list[Path]:
    """Compile `operator` into `folder` (made if missing); the files that were written.

    assembly: also write the PTX or the AMD assembly of every kernel, as text.

    Raises ValueError where the target's shared memory does not suffice, RuntimeError without Triton
    or where the compiler fails, OSError where the folder cannot be written.
    """
    return export_all([(operator, Path(folder))], assembly)[0]


def export_all(
    operators: Sequence[tuple[Operator, Path]], assembly: bool = False
) -> list[list[Path]]:
    """`export` for several operators, each with its folder, in one process."""
    for _, folder in operators:
        folder.mkdir(parents=True, exist_ok=True)
    # In a process of its own: kernels that were imported under TRITON_INTERPRET cannot be compiled.
    given = [[asdict(operator), str(folder.resolve())] for operator, folder in operators]
    options = ["--assembly"] if assembly else []
    printed = aot.run_compiling(f"{__name__}.compile", options, json.dumps(given))
    return [[Path(path) for path in paths] for paths in json.loads(printed)]
