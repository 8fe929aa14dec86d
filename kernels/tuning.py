"""Launch configurations of all kernels, in one place.

`configuration` answers from `tuned/<arch>.json` where that file has an entry, else by heuristic:
a few configurations per architecture and width of the inputs, all of them compiled by `aot.py` for
every target without spills. No configuration changes a result beyond the order of additions.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

KERNELS = ("scale", "match", "fused", "push")
DTYPES = ("float32", "bfloat16", "float16")
INTERPRETED = "interpreted"


class Config(NamedTuple):
    """BLOCK_M rows own a program, BLOCK_N columns a tile, BLOCK_K channels a step."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    def meta(self, *names: str) -> dict[str, int]:
        """Keyword arguments of a launch: the named blocks, `num_warps` and `num_stages`."""
        fields = self._asdict()
        return {name: fields[name] for name in (*names, "num_warps", "num_stages")}


# One row of a token is read and reduced, or written: bound by memory, the same everywhere.
_SCALE = Config(16, 0, 128, 4, 1)
_PUSH = Config(8, 0, 256, 4, 1)

# Matching, per family of architectures and bytes of an element: (large, small). The small one keeps
# more multiprocessors busy when there are few rows.
_MATCH: dict[str, dict[int, tuple[Config, Config]]] = {
    "sm_80": {
        2: (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 4)),
        4: (Config(64, 64, 16, 8, 2), Config(32, 64, 16, 4, 2)),
    },
    "sm_90": {
        2: (Config(128, 128, 64, 8, 3), Config(64, 128, 64, 4, 3)),
        4: (Config(64, 64, 16, 8, 2), Config(32, 32, 16, 4, 2)),
    },
    "sm_100": {
        2: (Config(128, 128, 64, 8, 3), Config(64, 128, 64, 4, 3)),
        4: (Config(64, 64, 16, 8, 2), Config(32, 64, 32, 8, 2)),
    },
    "gfx942": {
        2: (Config(128, 128, 32, 8, 2), Config(64, 64, 32, 4, 2)),
        4: (Config(64, 64, 16, 8, 2), Config(32, 32, 16, 4, 2)),
    },
}

# Large enough that numpy, not the interpreter, does the work; small enough that tests meet several
# tiles and several steps.
_INTERPRETED = {
    "scale": Config(64, 0, 128, 1, 1),
    "match": Config(64, 64, 128, 1, 1),
    "fused": Config(64, 64, 128, 1, 1),
    "push": Config(64, 0, 128, 1, 1),
}

# Rows below which the small configuration is chosen.
_FEW_ROWS = 2048


def _family(arch: str) -> str:
    """The architecture whose configurations serve `arch`, such as `sm_90` or `gfx942`."""
    if arch in _MATCH:
        return arch
    if arch.startswith("gfx"):
        return "gfx942"
    # sm_86, sm_89 and sm_120 have 99 KiB of shared memory, which the sm_80 blocks respect.
    return "sm_80"


@functools.cache
def _tuned(arch: str) -> dict[str, list[dict[str, object]]]:
    """Measured entries: {"kernel/dtype": [{"N": .., "M": .., "D": .., "config": [5 integers]}]}."""
    path = Path(__file__).parent / "tuned" / f"{arch}.json"
    if not path.is_file():
        return {}
    entries: dict[str, list[dict[str, object]]] = json.loads(path.read_text(encoding="utf-8"))
    return entries


def _choices(kernel: str, arch: str, dtype: str) -> tuple[Config, ...]:
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {KERNELS}, got {kernel!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    if arch == INTERPRETED:
        return (_INTERPRETED[kernel],)
    if kernel == "scale":
        return (_SCALE,)
    if kernel == "push":
        return (_PUSH,)
    return _MATCH[_family(arch)][4 if dtype == "float32" else 2]


@functools.lru_cache(maxsize=1024)
def configuration(kernel: str, arch: str, dtype: str, N: int, M: int, D: int) -> Config:
    """The configuration of one launch.

    Args:
        kernel: one of `KERNELS`.
        arch: `"sm_90"`, `"gfx942"`, ..., or `INTERPRETED`; unknown ones get a conservative choice.
        dtype: one of `DTYPES`.
        N, M, D: source tokens, reference tokens, channels.
    """
    for entry in _tuned(arch).get(f"{kernel}/{dtype}", ()):
        if (entry["N"], entry["M"], entry["D"]) == (N, M, D):
            return Config(*entry["config"])  # type: ignore[misc]
    choices = _choices(kernel, arch, dtype)
    return choices[-1] if N < _FEW_ROWS else choices[0]


def shipped_configurations(arch: str) -> Iterator[tuple[str, str, Config]]:
    """Every (kernel, dtype, config) that `configuration` can return for `arch`, once each."""
    for kernel in KERNELS:
        for dtype in DTYPES:
            tuned = (
                Config(*entry["config"])  # type: ignore[misc]
                for entry in _tuned(arch).get(f"{kernel}/{dtype}", ())
            )
            for config in dict.fromkeys((*_choices(kernel, arch, dtype), *tuned)):
                yield kernel, dtype, config
