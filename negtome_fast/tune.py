"""`negtome-fast tune`: search launch configurations on this GPU, write them to a tuning table.

Space -> what can fit by arithmetic -> what compiles without spills and fits by the compile report
-> what is right on random tokens -> what is fastest, under CUDA graphs with rotating inputs.
Without a GPU `--dry-run` goes as far as the compile report.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .files import write_atomically
from .info import version_of
from .kernels import aot, compile_report, tuning
from .kernels.tuning import Config, Problem

Mode = Literal["first", "others"]
#: Of every set of rotating inputs together, so that no input stays in a cache between two uses.
ROTATION_BYTES = 256 * 2**20
#: Programs of a persistent launch where the device is not there to be asked, for predictions only.
MULTIPROCESSORS = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148, "gfx942": 304}
#: How many configurations of a kernel are measured: in full; and with --quick or little time.
MEASURED, QUICK = 24, 6
LITTLE_TIME = 300.0


# ---------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    """Image tokens (items, tokens, channels) in equal groups."""

    items: int
    tokens: int
    channels: int
    groups: int = 1

    def problem(self, dtype: str, others: bool = False) -> Problem:
        """What the tables are asked: in mode "first", or "others"."""
        size = self.items // self.groups
        products = self.groups * (size * (size - 1) if others else size - 1)
        return Problem(dtype, products, self.tokens, self.tokens, self.channels)

    def __str__(self) -> str:
        size = f"{self.items}x{self.tokens}x{self.channels}"
        return size if self.groups == 1 else f"{size}/{self.groups}"


#: FLUX 1024 px, SDXL 1024 px at both grids, FLUX 768 px, SD3, Wan 720p; most important first.
SHAPES = (
    Shape(4, 4096, 3072),
    Shape(8, 4096, 640, 2),
    Shape(8, 1024, 1280, 2),
    Shape(4, 2304, 3072),
    Shape(4, 4096, 1536),
    Shape(4, 256, 640),
    Shape(2, 75600, 5120),
)


def parse_shape(text: str) -> Shape:
    """`"4x4096x640"`, or `"8x4096x640/2"` with two groups. Raises ValueError otherwise."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:/(\d+))?", text)
    if not found:
        raise ValueError(f"shape {text!r} is not ITEMSxTOKENSxCHANNELS or .../GROUPS")
    items, tokens, channels, groups = (int(part or 1) for part in found.groups())
    if min(items, tokens, channels, groups) < 1 or items % groups or items == groups:
        raise ValueError(f"shape {text!r} needs 2 or more items in each of its equal groups")
    return Shape(items, tokens, channels, groups)


# ---------------------------------------------------------------------------------------------
# The space, and what of it can run well
# ---------------------------------------------------------------------------------------------
def space(kernel: str) -> Iterator[Config]:
    """All configurations of a kernel that are thought of, before any pruning."""
    if kernel == "finish":
        for rows, channels, warps in itertools.product((1, 4, 8, 16), (256, 512, 1024), (4, 8)):
            yield Config(rows, 0, channels, warps, 1)
        return
    blocks = itertools.product((32, 64, 128, 256), (32, 64, 128, 256), (16, 32, 64, 128))
    for (rows, columns, channels), warps, stages in itertools.product(blocks, (4, 8), (2, 3, 4, 5)):
        if kernel == "rows":
            yield Config(rows, columns, channels, warps, stages)
            continue
        for group, resident, descriptors in itertools.product((8, 16), (1, 2), (0, 1)):
            yield Config(rows, columns, channels, warps, stages, group, resident, descriptors)


def fits(config: Config, kernel: str, dtype: str, arch: str) -> bool:
    """Whether a configuration can be worth compiling, by arithmetic alone.

    Shared memory of all stages, also of RESIDENT programs together; accumulators in at most half of
    the registers (a quarter for pairs, which reduces them twice), at least 4 of them a thread; at
    least 64 bytes of a token at a time; for tiles on tensor cores 32 multiply-adds or more for each
    element read; descriptors where the hardware has them, with blocks that fit their 128-byte
    swizzle.
    """
    target = aot.TARGETS[arch]
    threads = config.num_warps * target.warp_size
    if kernel == "finish":
        per_thread = config.BLOCK_M * config.BLOCK_K / threads
        return 4 <= per_thread <= 32
    size = tuning.element_size(dtype)
    # Only Hopper and later keep all stages in shared memory.
    hopper = target.backend == "cuda" and isinstance(target.arch, int) and target.arch >= 90
    stages = config.num_stages if hopper else config.num_stages - 1
    shared = (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * size * max(stages, 1)
    if shared > target.shared_limit:
        return False
    if config.RESIDENT * (shared + target.shared_reserved) > target.shared_total:
        return False
    accumulators = config.BLOCK_M * config.BLOCK_N / threads
    most = 64 if kernel == "pairs" else 128
    if not 4 <= accumulators <= most / config.RESIDENT or config.BLOCK_K * size < 64:
        return False
    reads = config.BLOCK_M + config.BLOCK_N
    if kernel != "rows" and size == 2 and 32 * reads > config.BLOCK_M * config.BLOCK_N:
        return False
    if dtype == "float32" and target.backend == "cuda" and config.num_stages > 2:
        return False  # no tensor cores to keep busy: deeper pipelines only cost memory
    if config.DESCRIPTORS:
        return hopper and size == 2 and config.BLOCK_K * size <= 128
    return True


def predicted(config: Config, problem: Problem, multiprocessors: int) -> float:
    """A figure that orders configurations before they are measured, smaller is better; no time.

    Waves of programs, times what one program does: its multiply-adds, slowed down where its tile
    reads many bytes for each of them, and an epilogue that costs as much as 80 channels.
    """
    row_blocks = -(-problem.N // config.BLOCK_M)
    column_blocks = -(-problem.M // config.BLOCK_N)
    tasks = problem.products * row_blocks * column_blocks
    waves = -(-tasks // (multiprocessors * config.RESIDENT)) * config.RESIDENT
    area = config.BLOCK_M * config.BLOCK_N
    # A 128 x 256 tile does 85 multiply-adds for each element that it reads.
    starved = max(1.0, 64 * (config.BLOCK_M + config.BLOCK_N) / area)
    hidden = 0.5 if config.RESIDENT > 1 else 1.0
    steps = -(-problem.D // config.BLOCK_K) * config.BLOCK_K
    pipeline = 1 + 0.1 / (config.num_stages - 1) if config.num_stages > 1 else 2.0
    return waves * area * (steps * starved * pipeline + 80 * hidden)


def _varied(configurations: Sequence[Config], keep: int) -> list[Config]:
    """In the same order, but a third of `keep` of each block size before more of the same.

    Most variants of one block size are predicted alike; the first few would otherwise be all there
    is to measure.
    """
    met: Counter[tuple[int, int]] = Counter()
    turns: list[int] = []
    for config in configurations:
        blocks = config.BLOCK_M, config.BLOCK_N
        turns.append(met[blocks] // max(keep // 3, 1))
        met[blocks] += 1
    order = sorted(range(len(turns)), key=lambda number: turns[number])  # stable within a turn
    return [configurations[number] for number in order]


# Rows of the compile report; the shapes of one run share most of their candidates.
_compiled: dict[tuple[Any, ...], dict[str, Any]] = {}


def pruned(
    kernel: str,
    problem: Problem,
    arch: str,
    keep: int,
    multiprocessors: int,
) -> list[dict[str, Any]]:
    """Compile report of at most `keep` configurations that may run, most promising first.

    Compiles in rounds until enough of them are good: neither errors, spills nor too much shared
    memory, with tensor cores, and with RESIDENT programs on a multiprocessor.
    """
    possible = [config for config in space(kernel) if fits(config, kernel, problem.dtype, arch)]
    if kernel != "finish":
        possible.sort(key=lambda config: predicted(config, problem, multiprocessors))
        possible = _varied(possible, keep)
    good: list[dict[str, Any]] = []
    for first in range(0, len(possible), keep):
        batch = [(kernel, problem.dtype, config) for config in possible[first : first + keep]]
        missing = [some for some in batch if (arch, *some) not in _compiled]
        if missing:
            rows = compile_report.report_configurations(arch, missing)
            _compiled.update(zip(((arch, *some) for some in missing), rows, strict=True))
        reports = [_compiled[arch, *some] for some in batch]
        good += [row for row in reports if not compile_report.problems(row)]
        if len(good) >= keep:
            break
    return good[:keep]


# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------
def random_tokens(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Tokens of which about half resemble a token of their group's first item."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.items, shape.tokens, shape.channels)
    x = torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)
    group = shape.items // shape.groups
    for item in range(shape.items):
        if item % group:
            order = torch.randperm(shape.tokens, generator=generator, device=device)
            x[item, ::2].lerp_(x[item - item % group, order[::2]], 0.7)
    return x


@contextmanager
def forced(kind: str, **configurations: Config) -> Iterator[None]:
    """Inside, every launch is of this kind, with these configurations in place of the table's."""
    original = tuning.plan

    def plan(*problem: Any) -> tuning.Plan:
        return original(*problem)._replace(kind=kind, **configurations)

    tuning.plan = plan
    try:
        yield
    finally:
        tuning.plan = original


def wrong(x: Tensor, reference: Mode, groups: int, expected: Tensor) -> str | None:
    """What is wrong with the Triton backend's result on `x`; None where it is right.

    expected: (B, 1, N) the best cosines. The chosen token's must be as good to rounding, and the
    output must be the push that was reported.
    """
    from .functional import guide_tokens

    y, similarity, pushed = guide_tokens(
        x, reference, groups=groups, alpha=0.9, threshold=0.65, backend="triton"
    )
    tolerance = torch.finfo(torch.float32).eps * (8.0 + 4.0 * x.shape[2] ** 0.5)
    found = expected > -torch.inf
    if not torch.equal(similarity > -torch.inf, found):
        return "a match where there is none, or none where there is one"
    lost = (similarity - expected)[found].abs()
    if lost.numel() and not float(lost.max()) <= tolerance:
        return f"a cosine is off by {float(lost.max()):.1e}"
    tokens, size = x.shape[1], x.shape[0] // groups
    for item in range(x.shape[0]):
        moves = pushed[item, 0] >= 0
        slot, token = pushed[item, 0] // tokens, pushed[item, 0] % tokens
        start = item - item % size
        others = reference == "others"
        source = start + slot + (slot >= item % size) if others else start + 0 * slot
        matched = x[source[moves], token[moves]].float()
        want = x[item].float()
        want[moves] += 0.9 * (want[moves] - matched)
        unit = torch.finfo(x.dtype).eps
        error = (y[item].float() - want).abs() - unit * want.abs()
        if not float(error.max()) <= 1e-5 * (1 + float(want.abs().max())):
            return f"item {item} was pushed wrongly"
    return None


def seconds_of(calls: Sequence[Callable[[], object]], budget: float = 0.2) -> float:
    """Median seconds of one call, replayed in a CUDA graph that holds one of each of `calls`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - started < budget and len(times) < 100):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(times)


class Bench:
    """Random inputs of one shape, what is right for them, and how long a call takes."""

    def __init__(self, shape: Shape, dtype: str, device: torch.device, reference: Mode) -> None:
        from .functional import guide_tokens

        self.shape, self.reference = shape, reference
        torch_dtype = getattr(torch, dtype)
        size = shape.items * shape.tokens * shape.channels * torch_dtype.itemsize
        sets = max(1, min(8, -(-ROTATION_BYTES // size)))
        self.inputs = [random_tokens(shape, torch_dtype, device, seed) for seed in range(sets)]
        _, self.expected, _ = guide_tokens(
            self.inputs[0], reference, groups=shape.groups, backend="torch"
        )

    def wrong(self) -> str | None:
        return wrong(self.inputs[0], self.reference, self.shape.groups, self.expected)

    def seconds(self) -> float:
        from .functional import negtome

        def call(x: Tensor) -> Callable[[], object]:
            return lambda: negtome(x, self.reference, groups=self.shape.groups, backend="triton")

        return seconds_of([call(x) for x in self.inputs])


def fastest(
    bench: Any,
    kind: str,
    kernel: str,
    candidates: Iterable[Config],
    fixed: dict[str, Config],
    say: Callable[[str], None],
    left: Callable[[], float],
) -> tuple[Config, float] | None:
    """The candidate of `kernel` with which the whole operator is fastest, and its seconds.

    Takes at most a quarter of the seconds that are left, once it has one candidate, so that what
    comes later has its turn. A candidate that fails or is wrong is told and passed over; None where
    none is left, or no time.
    """
    end = time.monotonic() + left() / 4
    best: tuple[Config, float] | None = None
    for config in candidates:
        if left() <= 0 or (best is not None and time.monotonic() > end):
            break
        with forced(kind, **{**fixed, kernel: config}):
            try:
                reason = bench.wrong()
                seconds = float("inf") if reason else bench.seconds()
            except Exception as error:  # the driver or compiler may refuse in any way; it is told
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if reason:
            say(f"  {kernel} {list(config)}: left out, {reason}")
            continue
        say(f"  {kernel} {list(config)}: {seconds * 1e6:.1f} us")
        if best is None or seconds < best[1]:
            best = config, seconds
    return best


def tune_shape(
    shape: Shape,
    dtype: str,
    candidates: Callable[[str, Problem], list[Config]],
    base: tuning.Plan,
    bench: Callable[[Shape, Mode], Any],
    say: Callable[[str], None],
    left: Callable[[], float],
) -> dict[str, Any] | None:
    """The measured entry of one shape; None where time ran out before tiles were measured.

    bench: (shape, reference) -> what has `wrong()` and `seconds()`. What was not measured keeps the
    configuration of `base`, and its kind where only one kind was measured.
    """
    problem = shape.problem(dtype)
    chosen = {kernel: base.configuration(kernel) for kernel in tuning.TUNED}
    seconds: dict[str, float] = {}

    def choose(some: Any, kind: str, kernel: str, asked: Problem) -> None:
        best = fastest(some, kind, kernel, candidates(kernel, asked), chosen, say, left)
        if best is not None:
            chosen[kernel], seconds[kernel] = best

    if left() <= 0:
        return None
    first = bench(shape, "first")
    for kernel, kind in (("tiles", "tiles"), ("rows", "rows"), ("finish", "tiles")):
        if left() > 0:
            choose(first, kind, kernel, problem)
    if "tiles" not in seconds:
        return None
    del first  # its inputs, before those of the other mode
    if left() > 0 and shape.tokens <= 16384:
        choose(bench(shape, "others"), "tiles", "pairs", shape.problem(dtype, others=True))
    kind = base.kind
    if "rows" in seconds:
        tiles = min(seconds["tiles"], seconds.get("finish", float("inf")))
        kind = "tiles" if tiles <= seconds["rows"] else "rows"
    return {
        **problem._asdict(),
        "kind": kind,
        "measured": True,
        **{kernel: list(config) for kernel, config in chosen.items()},
        "microseconds": {name: round(value * 1e6, 2) for name, value in seconds.items()},
    }


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------
def machine(device: torch.device) -> dict[str, Any]:
    """What a measurement was made on."""
    import subprocess

    def output(*command: str) -> str | None:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        lines = done.stdout.strip().splitlines()
        return lines[0] if done.returncode == 0 and lines else None

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "versions": {name: version_of(name) for name in ("torch", "triton", "negtome-fast")},
        "commit": output("git", "rev-parse", "HEAD"),
    }


def merge(table: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """`table` with `entry` in place of those of the same problem; other entries stay."""

    def key(some: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(some[name] for name in Problem._fields)

    kept = [other for other in table["entries"] if key(other) != key(entry)]
    # Measured entries come first: of equally near ones the first serves.
    entries = sorted([entry, *kept], key=lambda some: not some["measured"])
    return {**table, "entries": entries}


def text_of(table: dict[str, Any]) -> str:
    """A table as JSON with a line for each entry."""
    head = json.dumps({k: v for k, v in table.items() if k != "entries"}, indent=1)
    lines = ",\n".join("  " + json.dumps(entry) for entry in table["entries"])
    return f'{head[:-2]},\n "entries": [\n{lines}\n ]\n}}\n'


def write(path: Path, table: dict[str, Any]) -> None:
    """Replace the file in one step, so that no reader meets half of it.

    Raises:
        ValueError: a table that is not right. OSError: a folder that cannot be written to.
    """
    tuning.check(table, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text_of(table).encode())
    tuning.forget()


def start_table(path: Path, arch: str) -> dict[str, Any]:
    """The table that results are merged into: the file's own, else the one that serves `arch`."""
    table = tuning.load(path if path.is_file() else tuning.table_path(arch))
    if table["arch"] != arch:
        entries = [{**entry, "measured": False} for entry in table["entries"]]
        table = {**table, "arch": arch, "machine": None, "entries": entries}
    return table


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------
def dry_run(shapes: Sequence[Shape], dtype: str, arch: str, quick: bool) -> str:
    """The pruned space of every shape as the compile report's table."""
    parts = []
    for shape in shapes:
        for kernel in tuning.TUNED:
            problem = shape.problem(dtype, others=kernel == "pairs")
            keep = QUICK if quick else MEASURED
            rows = pruned(kernel, problem, arch, keep, MULTIPROCESSORS[arch])
            count = sum(1 for _ in space(kernel))
            parts.append(f"{shape} {dtype}, {kernel}: {len(rows)} to measure of {count}")
            parts.append(compile_report.table(rows))
    return "\n".join(parts)


def run(
    shapes: Sequence[Shape],
    dtype: str,
    quick: bool,
    out: Path | None,
    seconds: float | None,
    say: Callable[[str], None],
) -> Path:
    """Tune on the current GPU; the table is written after every shape. Returns its path.

    Raises:
        RuntimeError: there is no GPU that the Triton backend can use.
    """
    from .backends import triton_backend

    hint = "; `negtome-fast tune --dry-run` lists what would be measured"
    if not torch.cuda.is_available():
        raise RuntimeError(f"tuning measures on a GPU, and PyTorch finds none{hint}")
    device = torch.device("cuda", torch.cuda.current_device())
    usable, reason = triton_backend.available(device)
    if not usable or triton_backend._interpreting():
        raise RuntimeError(f"tuning needs compiled kernels: {reason}{hint}")
    arch = triton_backend._arch(device.index)
    # An architecture without limits of its own is pruned by those of its family.
    target = arch if arch in aot.TARGETS else tuning.family(arch)
    multiprocessors = triton_backend._multiprocessors(device.index)
    path = out or tuning.FOLDER / f"{arch}.json"
    table = start_table(path, arch)
    write(path, table)  # a folder that cannot be written to shows before the work, not after
    end = float("inf") if seconds is None else time.monotonic() + seconds
    keep = QUICK if quick or (seconds is not None and seconds < LITTLE_TIME) else MEASURED

    def left() -> float:
        return end - time.monotonic()

    def candidates(kernel: str, problem: Problem) -> list[Config]:
        rows = pruned(kernel, problem, target, keep, multiprocessors)
        own = tuning.plan(arch, *problem).configuration(kernel)
        return list(dict.fromkeys([own, *(Config(*row["config"]) for row in rows)]))

    for shape in shapes:
        if left() <= 0:
            say(f"{shape}: no time left")
            continue
        say(f"{shape} {dtype}")
        base = tuning.plan(arch, *shape.problem(dtype))
        entry = tune_shape(
            shape,
            dtype,
            candidates,
            base,
            lambda shape, reference: Bench(shape, dtype, device, reference),
            say,
            left,
        )
        if entry is None:
            say(f"{shape}: not enough was measured, the table keeps what it had")
            continue
        facts = machine(device)
        table = merge({**table, "machine": facts, "note": "measured"}, {**entry, "machine": facts})
        write(path, table)
        say(f"{shape}: {entry['kind']}, {entry['microseconds']}")
    return path
