"""Launch configurations of all kernels, from one table per architecture: `tuned/<arch>.json`.

`plan` returns the entry nearest to the problem (`distance`), so every shape is served and none is
tuned while it runs. The environment variable NEGTOME_FAST_TUNED names a folder; a file of the same
name there replaces the shipped one. A configuration changes only the order of additions.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

#: Kernels of the kind "coarse" in the order of their launches: int8 bounds (coarse.py), then exact
#: scores (coarse_scores.py).
COARSE = ("centre", "round", "bias", "bound", "select", "score")
#: scale: scales of reference tokens. fused: match and push, a program owns its rows. tiles, pairs:
#: match by tiles, pairs for the symmetric mode "others". push_from_keys: push from the keys of
#: tiles. resolve: keys to similarity and index. push: push from similarity and index. nudge:
#: embedding nudging (nudge.py).
KERNELS = (
    *("scale", "fused", "tiles", "pairs", "push_from_keys", "resolve", "push", "nudge"),
    *COARSE,
)
#: Kernels that an entry of a table configures.
TUNED = ("fused", "tiles", "pairs", "push_from_keys")
#: Ways to launch paper matching with combine="nearest". No shipped table has "coarse": it was
#: measured nowhere yet.
KINDS = ("fused", "tiles", "coarse")
DTYPES = ("float32", "bfloat16", "float16")
INTERPRETED = "interpreted"
FOLDER = Path(__file__).parent / "tuned"
FOLDER_VARIABLE = "NEGTOME_FAST_TUNED"
SCHEMA = 3
#: Scales of an item fill whole blocks of this many, so that loads of scales need no mask. BLOCK_M
#: and BLOCK_N are at most this.
SCALE_BLOCK = 256


class Config(NamedTuple):
    """Launch configuration of one kernel.

    Attributes:
        BLOCK_M, BLOCK_N, BLOCK_K: rows and columns of a block, and channels of a step.
        num_warps, num_stages: options of Triton.
        GROUP_M: (tiles, pairs, bound) blocks of rows that meet all columns before the next ones.
        CTAS_PER_SM: (tiles, pairs, bound, score) programs launched for each multiprocessor.
        DESCRIPTORS: (tiles, pairs, bound) 1: tensor descriptors where the tokens allow them.
        FLATTEN: (tiles, pairs) 1: one loop over tiles and channels, so that the loads of the next
            tile start before the epilogue. It acts with descriptors only.
        OVERLAP: (tiles) 1: match the last items by themselves, and push the others meanwhile.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8
    CTAS_PER_SM: int = 1
    DESCRIPTORS: int = 0
    FLATTEN: int = 0
    OVERLAP: int = 0

    def cap(self) -> dict[str, int]:
        """NVIDIA launch option by which CTAS_PER_SM programs share the 65,536 registers."""
        if self.CTAS_PER_SM == 1:
            return {}
        return {"maxnreg": 65536 // (self.CTAS_PER_SM * self.num_warps * 32) // 8 * 8}

    def meta(self, *names: str) -> dict[str, int]:
        """Keyword arguments of a launch: the named fields, `num_warps` and `num_stages`."""
        fields = self._asdict()
        return {name: fields[name] for name in (*names, "num_warps", "num_stages")}

    def options(self, cap: bool = False) -> tuple[tuple[str, int], ...]:
        """Launch options; with `cap` also the limit of registers."""
        limit = self.cap().items() if cap else ()
        return ("num_warps", self.num_warps), ("num_stages", self.num_stages), *limit


class Problem(NamedTuple):
    """Key of a table: `products` matrices of N source by M reference tokens of D channels."""

    dtype: str
    products: int
    N: int
    M: int
    D: int


class Plan(NamedTuple):
    """Launches of a problem: the kind for paper matching, and each kernel's configuration."""

    kind: str
    scale: Config
    fused: Config
    tiles: Config
    pairs: Config
    push_from_keys: Config
    resolve: Config
    push: Config
    nudge: Config
    centre: Config
    round: Config
    bias: Config
    bound: Config
    select: Config
    score: Config

    def configuration(self, kernel: str) -> Config:
        """Configuration of a kernel of `KERNELS`. Raises ValueError for any other name."""
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {KERNELS}, got {kernel!r}")
        config: Config = getattr(self, kernel)
        return config


#: One item a program, BLOCK_K values a step; a narrower item takes a block of its own width.
NUDGE = Config(1, 0, 4096, 8, 1)

# These kernels read and write every token once. They are bound by memory and take little of the
# time, so their configurations are the same everywhere.
_STREAMING = {
    "scale": Config(16, 0, 128, 4, 1),
    "resolve": Config(8, 0, 256, 4, 1),
    "push": Config(8, 0, 256, 4, 1),
    "nudge": NUDGE,
}

# Blocks for Triton's interpreter: large enough that numpy does the work, small enough that tests
# meet several tiles and several steps.
_INTERPRETED = Plan(
    "fused",
    scale=Config(64, 0, 128, 1, 1),
    fused=Config(64, 64, 128, 1, 1),
    tiles=Config(64, 64, 128, 1, 1, GROUP_M=2),
    pairs=Config(64, 64, 128, 1, 1, GROUP_M=2),
    push_from_keys=Config(64, 0, 128, 1, 1),
    resolve=Config(64, 0, 128, 1, 1),
    push=Config(64, 0, 128, 1, 1),
    nudge=NUDGE,
    centre=Config(64, 0, 128, 1, 1),
    round=Config(64, 0, 128, 1, 1),
    bias=Config(1, 64, 128, 1, 1),
    bound=Config(64, 64, 128, 1, 1, GROUP_M=2),
    select=Config(64, 16, 0, 1, 1),
    score=Config(64, 64, 128, 1, 1),
)

# The other kernels of the kind "coarse" are bound by memory. round holds whole tokens in registers;
# its BLOCK_K is the number of channels that the compile report checks.
_COARSE_STREAMING = {
    "centre": Config(64, 0, 64, 4, 1),
    "round": Config(1, 0, 8192, 8, 1),
    "bias": Config(1, 256, 1024, 4, 1),
    "select": Config(64, 16, 0, 4, 1),
}
# By architecture: bound, score for 2-byte dtypes, score for fp32.
_COARSE = {
    "sm_80": (
        Config(128, 128, 128, 8, 3),
        Config(128, 128, 32, 8, 3),
        Config(64, 64, 16, 8, 2),
    ),
    "sm_89": (
        Config(128, 128, 64, 8, 3),
        Config(128, 128, 32, 8, 3),
        Config(64, 64, 16, 8, 2),
    ),
    "sm_90": (
        Config(128, 256, 128, 8, 3, DESCRIPTORS=1),
        Config(128, 128, 64, 8, 3, CTAS_PER_SM=2),
        Config(64, 64, 16, 8, 2),
    ),
    "sm_100": (
        Config(128, 128, 128, 8, 3, DESCRIPTORS=1),
        Config(128, 128, 64, 8, 3),
        Config(64, 64, 16, 8, 2),
    ),
    "gfx942": (
        Config(128, 128, 64, 8, 2),
        Config(128, 128, 32, 8, 2),
        Config(64, 64, 16, 8, 2),
    ),
}

# Architectures without a table, and the one whose table serves them. sm_86, sm_120 and sm_121 have
# 99 KiB of shared memory, as sm_89 has.
_FAMILIES = {"sm_86": "sm_89", "sm_120": "sm_89", "sm_121": "sm_89", "sm_103": "sm_100"}


def family(arch: str) -> str:
    """The architecture whose shipped table serves `arch`, such as `sm_90` or `gfx942`."""
    if (FOLDER / f"{arch}.json").is_file():
        return arch
    if arch.startswith("gfx"):
        return "gfx942"
    return _FAMILIES.get(arch, "sm_80")


def table_path(arch: str) -> Path:
    """Table that serves `arch`: the user's own, else the shipped one of its family."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and (Path(folder) / f"{arch}.json").is_file():
        return Path(folder) / f"{arch}.json"
    return FOLDER / f"{family(arch)}.json"


# ---------------------------------------------------------------------------------------------
# Reading a table
# ---------------------------------------------------------------------------------------------
def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _config(value: Any, where: str) -> Config:
    expected = f"{len(Config._fields)} integers {list(Config._fields)}"
    if not isinstance(value, list) or len(value) != len(Config._fields):
        raise ValueError(f"{where} must be {expected}, got {value!r}")
    if not all(_whole(number, 0) for number in value):
        raise ValueError(f"{where} must be {expected}, none negative, got {value!r}")
    config = Config(*value)
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps"):
        number = getattr(config, name)
        if number & (number - 1) or (number == 0 and name != "BLOCK_N"):
            raise ValueError(f"{where}: {name} must be a power of two, got {number}")
    if min(config.num_stages, config.GROUP_M, config.CTAS_PER_SM) < 1:
        raise ValueError(f"{where}: num_stages, GROUP_M and CTAS_PER_SM must be at least 1")
    if max(config.BLOCK_M, config.BLOCK_N) > SCALE_BLOCK:
        raise ValueError(f"{where}: BLOCK_M and BLOCK_N must be at most {SCALE_BLOCK}")
    return config


def check(table: Any, source: str) -> list[dict[str, Any]]:
    """Check a table, and return its entries.

    Raises:
        ValueError: names `source`, the entry and its fault.
    """
    if not isinstance(table, Mapping) or table.get("schema") != SCHEMA:
        raise ValueError(f'{source}: not a tuning table of schema {SCHEMA} ("schema": {SCHEMA})')
    if table.get("fields") != list(Config._fields):
        raise ValueError(f'{source}: "fields" must be {list(Config._fields)}')
    entries = table.get("entries")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'{source}: "entries" must be a list that is not empty')
    widths = set()
    for number, entry in enumerate(entries):
        where = f"{source}: entry {number}"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where} is not an object")
        if entry.get("dtype") not in DTYPES:
            raise ValueError(f"{where}: dtype must be one of {DTYPES}, got {entry.get('dtype')!r}")
        for name in ("products", "N", "M", "D"):
            if not _whole(entry.get(name), 1):
                raise ValueError(f"{where}: {name} must be a positive integer")
        if entry.get("kind") not in KINDS:
            raise ValueError(f"{where}: kind must be one of {KINDS}, got {entry.get('kind')!r}")
        if not isinstance(entry.get("measured"), bool):
            raise ValueError(f'{where}: "measured" must be true or false')
        for kernel in TUNED:
            _config(entry.get(kernel), f"{where}: {kernel}")
        widths.add(element_size(entry["dtype"]))
    if widths != {2, 4}:
        raise ValueError(f"{source}: needs entries for 2-byte dtypes and for float32")
    return list(entries)


def element_size(dtype: str) -> int:
    """Bytes of one element."""
    return 4 if dtype == "float32" else 2


def load(path: Path) -> dict[str, Any]:
    """The checked table of a file. Raises OSError, or ValueError that names the file."""
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    check(table, str(path))
    return table


def _coarse(arch: str, dtype: str) -> dict[str, Config]:
    """The configurations of the kernels of kind "coarse"."""
    bound, *score = _COARSE[family(arch)]
    return {**_COARSE_STREAMING, "bound": bound, "score": score[element_size(dtype) == 4]}


@functools.cache
def _entries(path: Path) -> tuple[tuple[Problem, Plan], ...]:
    found = []
    for entry in load(path)["entries"]:
        problem = Problem(*(entry[name] for name in Problem._fields))
        configs = {kernel: Config(*entry[kernel]) for kernel in TUNED}
        configs |= _coarse(path.stem, problem.dtype)
        found.append((problem, Plan(entry["kind"], **_STREAMING, **configs)))
    return tuple(found)


# ---------------------------------------------------------------------------------------------
# Asking a table
# ---------------------------------------------------------------------------------------------
def distance(a: Problem, b: Problem) -> float:
    """Distance of two problems; infinite if their elements differ in size.

    The sum of |log2| of three ratios: of products * N, which sets the number of programs; of N * M,
    which sets the work of a matrix; and of D, which sets the length of the loop. A factor of two in
    any of them is 1. The other 2-byte dtype adds 0.01.
    """
    if element_size(a.dtype) != element_size(b.dtype):
        return math.inf
    far = 0.0 if a.dtype == b.dtype else 0.01
    for first, second in (
        (a.products * a.N, b.products * b.N),
        (a.N * a.M, b.N * b.M),
        (a.D, b.D),
    ):
        far += abs(math.log2(first / second))
    return far


@functools.lru_cache(maxsize=1024)
def plan(arch: str, dtype: str, products: int, N: int, M: int, D: int) -> Plan:
    """Plan of the nearest entry; of equally near entries the first in the file.

    Args:
        arch: `"sm_90"`, `"gfx942"`, ..., or `INTERPRETED`; unknown ones get a conservative table.
        dtype: one of `DTYPES`.
        products: pairs of a source item and a reference item that are compared.
        N, M, D: source tokens, reference tokens, channels.

    Raises:
        ValueError: the dtype is unknown, or the table has a fault.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    if arch == INTERPRETED:
        return _INTERPRETED
    problem = Problem(dtype, max(products, 1), max(N, 1), max(M, 1), max(D, 1))
    return min(_entries(table_path(arch)), key=lambda entry: distance(entry[0], problem))[1]


def forget() -> None:
    """Clear the caches, because a file has changed: the next call of `plan` reads it again."""
    _entries.cache_clear()
    plan.cache_clear()


def shipped_configurations(arch: str) -> Iterator[tuple[str, str, Config]]:
    """Every (kernel, dtype, config) that `plan` can return for `arch`, once each."""
    if arch == INTERPRETED:
        plans = [(Problem(dtype, 1, 1, 1, 1), _INTERPRETED) for dtype in DTYPES]
    else:
        plans = list(_entries(table_path(arch)))
    for kernel in KERNELS:
        for dtype in DTYPES:
            size = element_size(dtype)
            configs = (
                chosen.configuration(kernel)
                for problem, chosen in plans
                if element_size(problem.dtype) == size
            )
            for config in dict.fromkeys(configs):
                yield kernel, dtype, config
