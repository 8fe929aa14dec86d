"""Order the configurations to measure, by a model of the clocks that a multiprocessor needs.

    clocks = tiles of a multiprocessor * (steps * step + exposed)
    step    = the slowest of products, L2 reads, shared memory, latency / loads in flight; and issue
    exposed = latency, the first load, the epilogue

The figures come from data sheets and from the machine code (docs/kernels.md); none was measured.
Only the order is used, and measuring has the last word.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ..kernels import aot, tuning
from ..kernels.tuning import Config, Problem
from .space import fits, is_hopper, shared_bytes, space


class Rates(NamedTuple):
    """Peak rates of one multiprocessor per clock, and the number of multiprocessors.

    Attributes:
        half, single: multiply-adds of 2-byte elements (tensor cores), and of fp32.
        cache, memory: bytes from the L2 cache, and from memory while all multiprocessors read.
    """

    half: float
    single: float
    cache: float
    memory: float
    multiprocessors: int


RATES = {
    "sm_80": Rates(1024, 64, 48, 13, 108),
    "sm_89": Rates(512, 128, 32, 2.4, 142),
    "sm_90": Rates(2048, 128, 64, 14, 132),
    "sm_100": Rates(4096, 128, 64, 29, 148),
    "gfx942": Rates(1024, 128, 64, 8, 304),
}
#: Bytes of shared memory that are read or written per clock.
SHARED_MEMORY = 128
#: Clocks until a load from the L2 cache arrives.
LATENCY = 700
#: Clocks of a step that no other work hides: waiting at its barrier, starting its products.
BARRIER = 30
#: Instructions for every 16 bytes that pointers load: address, mask, the copy itself.
POINTER_INSTRUCTIONS = 4
#: Instructions of the epilogue for every accumulator, and the number of warps of a scheduler that
#: hide each other's latency.
EPILOGUE = {"fused": 5.0, "tiles": 5.0, "pairs": 30.0}
HIDING_WARPS = 3.4
#: Share of the work beside the slowest part that is not hidden.
NOT_HIDDEN = 0.1


class Tile(NamedTuple):
    """Clocks of one tile: beside other programs, alone, and the part that nothing hides."""

    busy: float
    alone: float
    exposed: float


def _shared_traffic(config: Config, size: int) -> float:
    """Bytes to and from shared memory in one step: loads are written, operands of products read.

    A warpgroup multiplies 64 rows by up to 256 columns, and reads both from shared memory.
    """
    groups = max(config.num_warps // 4, 1)
    down = min(groups, max(config.BLOCK_M // 64, 1))
    across = groups // down
    products = max(config.BLOCK_M / 64, 1) * across
    read = products * (64 + config.BLOCK_N / across)
    return (read + config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * size


def tile(
    config: Config, kernel: str, problem: Problem, arch: str, multiprocessors: int, residents: int
) -> Tile:
    """Clocks of one tile of a matching kernel; `residents` programs share a multiprocessor."""
    rates, target = RATES[arch], aot.TARGETS[arch]
    size = tuning.element_size(problem.dtype)
    area, edge = config.BLOCK_M * config.BLOCK_N, config.BLOCK_M + config.BLOCK_N
    products = area * config.BLOCK_K / (rates.half if size == 2 else rates.single)
    # A part of a token below 128 bytes, a line of the cache, takes a whole request.
    loads = edge * 128 * math.ceil(config.BLOCK_K * size / 128) / rates.cache
    beside = [products, loads]
    if is_hopper(target) and size == 2:
        beside.append(_shared_traffic(config, size) / SHARED_MEMORY)
    # Programs that run together read GROUP_M blocks of rows and the columns they need from memory.
    together = multiprocessors * residents
    rows = min(config.GROUP_M, -(-problem.N // config.BLOCK_M))
    columns = min(-(-together // rows), -(-problem.M // config.BLOCK_N))
    unique = (rows * config.BLOCK_M + columns * config.BLOCK_N) * config.BLOCK_K * size
    beside.append(unique / together / rates.memory)

    issue = float(BARRIER)
    if not config.DESCRIPTORS:
        copies = edge * config.BLOCK_K * size / 16
        issue += copies * POINTER_INSTRUCTIONS / 32 / 4
    slowest = max(beside)
    hidden = slowest + NOT_HIDDEN * (sum(beside) - slowest)
    in_flight = max(config.num_stages - 1, 1)
    arrival = (LATENCY + residents * loads) / in_flight  # loads of all programs queue
    steps = -(-problem.D // config.BLOCK_K)

    warps = config.num_warps / 4  # a multiprocessor has four schedulers
    epilogue = EPILOGUE[kernel] * area / 128 * max(1.0, HIDING_WARPS / warps)
    prologue = LATENCY + loads
    # One loop of tiles and channels starts the next tile's loads before the epilogue.
    exposed = max(prologue, epilogue) if config.FLATTEN else prologue + epilogue
    return Tile(steps * (hidden + issue), steps * (max(hidden, arrival) + issue), exposed)


def _residents(config: Config, dtype: str, arch: str) -> int:
    """Estimate of the programs of the kernel `fused` that fit a multiprocessor."""
    target = aot.TARGETS[arch]
    threads = config.num_warps * target.warp_size
    registers = min(config.BLOCK_M * config.BLOCK_N // threads + 96, 255)
    shared = shared_bytes(config, dtype, arch)
    return max(1, aot.resident_programs(target, registers, shared, config.num_warps))


def _push_from_keys(config: Config, problem: Problem, arch: str, multiprocessors: int) -> float:
    """A figure that orders configurations of `push_from_keys`, which is bound by memory.

    It counts what keeps memory from being busy: channels beyond the last; few bytes in flight per
    thread; and fewer warps than memory needs, a quarter of those that a multiprocessor holds.
    """
    target = aot.TARGETS[arch]
    elements = config.BLOCK_M * config.BLOCK_K / (config.num_warps * target.warp_size)
    wasted = -(-problem.D // config.BLOCK_K) * config.BLOCK_K / problem.D
    warps = problem.products * -(-problem.N // config.BLOCK_M) * config.num_warps
    idle = max(1.0, multiprocessors * target.warps / 4 / warps)
    return wasted * idle * (1 + 16 / (elements * tuning.element_size(problem.dtype)))


def predicted(
    kernel: str, config: Config, problem: Problem, arch: str, multiprocessors: int
) -> float:
    """Predicted clocks of a configuration; only their order is used.

    The busiest multiprocessor counts. Programs that share it hide each other's exposed clocks, and
    their tiles take as long as all of them together.
    """
    if kernel == "push_from_keys":
        return _push_from_keys(config, problem, arch, multiprocessors)
    row_blocks = -(-problem.N // config.BLOCK_M)
    column_blocks = -(-problem.M // config.BLOCK_N)
    residents = config.CTAS_PER_SM
    if kernel == "fused":
        residents = _residents(config, problem.dtype, arch)
    tasks = problem.products * row_blocks * (1 if kernel == "fused" else column_blocks)
    share = -(-tasks // multiprocessors)
    residents = min(residents, share)
    cost = tile(config, kernel, problem, arch, multiprocessors, residents)
    if kernel == "fused":
        cost = Tile(*(column_blocks * clocks for clocks in cost))
    return share / residents * max(residents * cost.busy, cost.alone + cost.exposed)


def _varied(configurations: Sequence[Config], keep: int) -> list[Config]:
    """The same order, but at most a third of `keep` of a block size before other sizes follow.

    Most variants of one block size are predicted alike; they would otherwise fill the whole list.
    """
    met: Counter[tuple[int, int]] = Counter()
    turns: list[int] = []
    for config in configurations:
        blocks = config.BLOCK_M, config.BLOCK_N
        turns.append(met[blocks] // max(keep // 3, 1))
        met[blocks] += 1
    order = sorted(range(len(turns)), key=lambda number: turns[number])  # stable within a turn
    return [configurations[number] for number in order]


@functools.lru_cache(maxsize=256)
def ordered(
    kernel: str, problem: Problem, arch: str, multiprocessors: int, keep: int
) -> tuple[Config, ...]:
    """All configurations of `kernel` that can fit, most promising first."""
    possible = [config for config in space(kernel) if fits(config, kernel, problem.dtype, arch)]
    # On a tie the configuration with least shared memory comes first.
    possible.sort(
        key=lambda config: (
            predicted(kernel, config, problem, arch, multiprocessors),
            config.num_stages,
        )
    )
    return tuple(possible if kernel == "push_from_keys" else _varied(possible, keep))
