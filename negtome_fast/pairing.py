"""Which source item is compared with which reference item: plain integers, no tensors.

Every mode of the operator is one table `(items, slots) -> reference item`:
`first` has one slot (item 0 of the group), `others` one for each other item of the group,
`external` one for each reference that the caller passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

Mode = Literal["first", "others", "external"]


@dataclass(frozen=True)
class Pairing:
    """Source items in equal contiguous groups, and the reference items that each of them meets.

    Attributes:
        mode: `"first"` and `"others"` take references from the batch itself, so that the tensor of
            references is the tensor of sources; `"external"` takes a tensor `(P, M, D)`.
        items: number of source items B.
        groups: number of groups that never see each other; divides `items`.
        references: number of external references R that an item meets; 1 in the other modes.
        per_item: True if external references are `(B * R, M, D)`, a set for each item; False if
            they are `(R, M, D)`, shared by all.
    """

    mode: Mode
    items: int
    groups: int = 1
    references: int = 1
    per_item: bool = False

    @property
    def group_size(self) -> int:
        return self.items // self.groups

    @property
    def slots(self) -> int:
        """Number of reference items that a source item is compared with."""
        if self.mode == "first":
            return 1
        return self.group_size - 1 if self.mode == "others" else self.references

    @property
    def sources(self) -> tuple[int, ...]:
        """The items that may move: for `"first"` all but the first of each group, else all."""
        if self.mode == "first":
            return tuple(b for b in range(self.items) if b % self.group_size)
        return tuple(range(self.items))

    def reference_item(self, item: int, slot: int) -> int:
        """The reference item that source `item` meets in `slot`; ascending in `slot`."""
        if self.mode == "external":
            return item * self.references + slot if self.per_item else slot
        start = item - item % self.group_size
        if self.mode == "first":
            return start
        return start + slot + (slot >= item % self.group_size)


_known_pairing = lru_cache(maxsize=256)(Pairing)


def pairing_of(
    mode: Mode, items: int, groups: int, references: int = 1, per_item: bool = False
) -> Pairing:
    """Return the `Pairing` of these arguments, the same object for equal ones.

    Symbolic sizes, which compilers use, are not cached.
    """
    known = type(items) is int and type(references) is int and not torch.compiler.is_compiling()
    make = _known_pairing if known else Pairing
    return make(mode, items, groups, references, per_item)
