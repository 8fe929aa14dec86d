"""`Operator`: the choices of a call that an export fixes, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ...kernels import aot, tuning
from ...pairing import Mode, Pairing

#: Short dtype names of the command line -> names in tuning tables.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
REFERENCES = ("first", "others", "external")
#: Largest sizes: items lie in a grid's second axis, and the rest is far beyond all models.
MOST = {"channels": 2**16, "items": 2**16 - 1, "tokens": 2**24}
#: Ways to launch -> kinds of tuning tables. "auto" takes the table's own kind.
KINDS = {"auto": None, "rows": "fused", "tiles": "tiles"}


@dataclass(frozen=True)
class Operator:
    """The operator to compile. It fixes choices that `negtome_fast.negtome` makes at run time.

    Attributes:
        target: `"sm_80"`, `"sm_89"`, `"sm_90"`, `"sm_100"` or `"gfx942"`.
        dtype: `"bfloat16"`, `"float16"`, `"float32"` or `"bf16"`, `"fp16"`, `"fp32"`.
        channels: the D that the configuration is chosen for. Kernels run with any D, or with any
            multiple of 16 if this D is one.
        reference: `"first"`, `"others"`, or `"external"` for a tensor of references.
        matching, combine: as in `negtome_fast.negtome`.
        inplace: write into `x`, only the tokens that move; not with `reference="others"`.
        reference_mask, source_mask: True if calls pass this mask.
        kind: `"tiles"`, `"rows"` (match and push in one launch, the kind "fused" of tuning tables),
            or `"auto"` (default): the kind of the tuning table for `items` of `tokens`.
        items, tokens: number of items, and of tokens in each, that the tuning table is asked for;
            default 4 and 4,096.

    Raises:
        ValueError: names an attribute that has no such value, and its valid values. Sizes are at
            most those of `MOST`.
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
            if value > MOST[name]:
                raise ValueError(f"{name} must be at most {MOST[name]}, got {value!r:.40}")
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
        """Return True if a call writes the matches of all slots before it pushes."""
        return self.matching == "official" or self.combine == "sum"

    @property
    def divisor(self) -> int:
        """Number that channels and strides must be multiples of: 16, or 1."""
        return 1 if self.channels % 16 else 16

    def plan(self) -> tuning.Plan:
        """The tuning table's plan, of the chosen kind, with pointers for tensor descriptors."""
        pairing = Pairing(cast(Mode, self.reference), self.items)
        products = len(pairing.sources) * pairing.slots
        plan = tuning.plan(
            self.target, self.dtype, products, self.tokens, self.tokens, self.channels
        )
        kind = "tiles" if self.resolves else KINDS[self.kind] or plan.kind
        if kind == "coarse":  # more launches than are exported; tiles choose the same tokens
            kind = "tiles"
        return plan._replace(
            kind=kind,
            tiles=plan.tiles._replace(DESCRIPTORS=0),
            pairs=plan.pairs._replace(DESCRIPTORS=0),
        )

    @property
    def kind_word(self) -> str:
        """The kind of launch in the words of `KINDS`: "rows" or "tiles", never "auto"."""
        plan = self.plan()
        return next(word for word, kind in KINDS.items() if kind == plan.kind)
