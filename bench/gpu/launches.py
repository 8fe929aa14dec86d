"""Kinds of launches by name, and how to launch without those that failed.

A kind is a kernel, and for the tile kernel a way to read tokens: by tensor descriptors or pointers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from ..shapes import Shape

KINDS = (
    "scale",
    "rows",
    "tiles",
    "tiles by descriptors",
    "pairs",
    "pairs by descriptors",
    "resolve",
    "finish",
    "push",
    "nudge",
)


@contextmanager
def launching(kind: str | None, descriptors: bool | None = None) -> Iterator[None]:
    """Inside, paper matching is launched as `kind`, tiles with descriptors or without.

    kind: "rows" or "tiles"; None leaves the choice to the tuning table, as None does for
    `descriptors`.
    """
    from negtome_fast.kernels import tuning

    original = tuning.plan

    def changed(config: tuning.Config) -> tuning.Config:
        if descriptors is None:
            return config
        fields: dict[str, int] = {"DESCRIPTORS": int(descriptors)}
        if not descriptors and "FLATTEN" in config._fields:
            # A flattened loop is for descriptors only.
            fields["FLATTEN"] = 0
        return config._replace(**fields)

    def plan(*problem: Any) -> tuning.Plan:
        found = original(*problem)
        found = found._replace(tiles=changed(found.tiles), pairs=changed(found.pairs))
        return found if kind is None else found._replace(kind=kind)

    tuning.plan = plan
    try:
        yield
    finally:
        tuning.plan = original


def choice(shape: Shape, broken: Collection[str]) -> tuple[str | None, bool | None] | str:
    """Arguments of `launching` for a shape that avoid the `broken` kinds, or why there are none.

    (None, None), the tuning table's own choice, where nothing that it may need is broken.
    """
    if "scale" in broken:
        return "scale failed, which everything needs"
    tile = "pairs" if shape.others else "tiles"
    described = f"{tile} by descriptors"
    bad = {tile, described, "finish", "rows"} & set(broken)
    if not bad:
        return None, None
    if "finish" not in bad and not {tile, described} <= bad:
        if tile in bad or described in bad:
            return "tiles", tile in bad
        return "tiles", None
    if "rows" not in bad:
        return "rows", None
    return f"{', '.join(sorted(bad))} failed: no way to launch is left"
