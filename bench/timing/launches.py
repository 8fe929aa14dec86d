"""Kinds of launches by name, and launches that avoid the kinds that failed.

A kind is a kernel; the tile kernel has a kind for each way to read tokens, to loop, and to push.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..compared.shapes import Shape

KINDS = (
    "scale",
    "fused",
    "tiles",
    "tiles by descriptors",
    "tiles flattened",
    "tiles overlapped",
    "pairs",
    "pairs by descriptors",
    "resolve",
    "push_from_keys",
    "push",
    "coarse",
    "nudge",
)
POINTERS = {"DESCRIPTORS": 0, "FLATTEN": 0, "OVERLAP": 0}
WAYS: dict[str, dict[str, int]] = {
    "by descriptors": {**POINTERS, "DESCRIPTORS": 1},
    "flattened": {**POINTERS, "DESCRIPTORS": 1, "FLATTEN": 1},
    "overlapped": {**POINTERS, "OVERLAP": 1},
}
"""Way of the tile kernel -> fields of its configuration."""


@contextmanager
def launching(kind: str | None, fields: Mapping[str, int] | None = None) -> Iterator[None]:
    """Launch paper matching as `kind`, and tiles with other `fields` of their Config.

    `kind` is a kind of `tuning.Plan`; None leaves the choice to the tuning table.
    """
    from negtome_fast.kernels import tuning

    original = tuning.plan

    def plan(*problem: Any) -> tuning.Plan:
        found = original(*problem)
        tiles, pairs = (config._replace(**(fields or {})) for config in (found.tiles, found.pairs))
        found = found._replace(tiles=tiles, pairs=pairs)
        return found if kind is None else found._replace(kind=kind)

    tuning.plan = plan
    try:
        yield
    finally:
        tuning.plan = original


def choice(shape: Shape, broken: Collection[str]) -> tuple[str | None, dict[str, int]] | str:
    """Arguments of `launching` that avoid the `broken` kinds, or the reason why there are none.

    They are (None, {}), the choice of the tuning table, if nothing that it may need is broken.
    """
    if "scale" in broken:
        return "scale failed, which everything needs"
    tile = "pairs" if shape.others else "tiles"
    described = f"{tile} by descriptors"
    fields: dict[str, int] = {}
    if f"{tile} flattened" in broken:
        fields["FLATTEN"] = 0
    if f"{tile} overlapped" in broken:
        fields["OVERLAP"] = 0
    bad = {tile, described, "push_from_keys", "fused"} & set(broken)
    if not bad:
        return None, fields
    if "push_from_keys" not in bad and not {tile, described} <= bad:
        if described in bad:
            return "tiles", fields | {"DESCRIPTORS": 0, "FLATTEN": 0}
        if tile in bad:
            return "tiles", fields | {"DESCRIPTORS": 1}
        return "tiles", fields
    if "fused" not in bad:
        return "fused", {}
    return f"{', '.join(sorted(bad))} failed: no way to launch is left"
