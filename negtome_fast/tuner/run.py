"""A whole tuning run: choose configurations, compile them, measure them, write the table.

All configurations of the space -> those that can fit by arithmetic -> those that compile without
spills -> those that are right on random tokens -> the fastest one, under CUDA graphs with rotating
inputs. `dry_run` needs no GPU and ends with the compile report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..kernels import aot, tuning
from ..kernels.tuning import Config, Problem
from ..provenance import version_of
from . import compile_report, launches, tables
from .candidates import MEASURED, QUICK, Key, Rows, listed, pruned, wanted
from .measure import Bench, Mode, forced, tune_shape
from .predict import RATES
from .space import TokenShape, space

#: With fewer seconds than this, only the most promising configurations are measured.
LITTLE_TIME = 300.0
#: Rounds in which candidates that compile badly are replaced by others before measuring.
ROUNDS = 4

OperatorCall = Callable[[TokenShape, Mode], object]


def dry_run(
    shapes: Sequence[TokenShape],
    dtype: str,
    arch: str,
    quick: bool,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """The compile report of all configurations that tuning these shapes on `arch` would measure.

    say: called with a line before configurations without a shipped report are compiled, which takes
    seconds each.
    """
    parts = []
    reports = listed(arch, version_of("triton") or "")

    def compiled(keys: Sequence[Key]) -> list[dict[str, Any]]:
        say(f"compiling {len(keys)} configurations of {keys[0][0]} for {arch}")
        return compile_report.report_configurations(arch, keys)

    for shape in shapes:
        for kernel in shape.kernels:
            problem = shape.problem(dtype, others=kernel == "pairs")
            keep = QUICK if quick else MEASURED
            multiprocessors = RATES[arch].multiprocessors
            rows = pruned(kernel, problem, arch, multiprocessors, keep, reports, compiled)
            count = sum(1 for _ in space(kernel))
            parts.append(f"{shape} {dtype}, {kernel}: {len(rows)} to measure of {count}")
            parts.append(compile_report.table(rows))
    return "\n".join(parts)


class Candidates:
    """Configurations to measure for a problem: the table's own, and those that compile well.

    Attributes:
        known: number of configurations whose compile report was shipped.
        reports: rows of the compile report of configurations that are known to be bad, and of all
            that `prepare` has compiled.
    """

    def __init__(self, arch: str, target: str, multiprocessors: int, keep: int) -> None:
        self.arch, self.target = arch, target
        self.multiprocessors, self.keep = multiprocessors, keep
        shipped = listed(target, version_of("triton") or "")
        self.known = len(shipped)
        # Good ones are compiled again as they are launched, and that report has the last word.
        self.reports: Rows = {k: row for k, row in shipped.items() if compile_report.problems(row)}

    def own(self, kernel: str, problem: Problem) -> Key:
        """The table's configuration for the problem."""
        config = tuning.plan(self.arch, *problem).configuration(kernel)
        return kernel, problem.dtype, config

    def wanted(self, kernel: str, problem: Problem, spare: bool = False) -> list[Key]:
        """Most promising configurations that are not known to be bad, see `candidates.wanted`."""
        where = (self.target, self.multiprocessors, self.keep)
        return wanted(kernel, problem, *where, self.reports, spare)

    def prepare(self, shapes: Sequence[TokenShape], dtype: str, call: OperatorCall) -> int:
        """Compile the candidates of all shapes in parallel, as they are launched.

        A candidate that compiles badly is replaced by the next one, in at most `ROUNDS` rounds;
        without a shipped list of bad ones there are many. call: runs the operator once for a shape
        and a reference. Returns the number of configurations that were compiled.
        """
        compiled: set[Key] = set()
        for number in range(ROUNDS):
            jobs: dict[Key, Callable[[], object]] = {}
            for shape, kernel in ((each, kernel) for each in shapes for kernel in each.kernels):
                problem = shape.problem(dtype, others=kernel == "pairs")
                keys = (self.own(kernel, problem), *self.wanted(kernel, problem))
                if number and not compiled.issuperset(keys):
                    keys = (*keys, *self.wanted(kernel, problem, spare=True))
                for key in keys:
                    if key not in compiled:
                        jobs[key] = partial(launch, key, shape, call)
            if not jobs:
                break
            rows = launches.compile_all(self.target, list(jobs.items()))
            self.reports |= {key: row for key, row in zip(jobs, rows, strict=True) if row}
            compiled |= set(jobs)
        return len(compiled)

    def __call__(self, kernel: str, problem: Problem) -> list[Config]:
        keys = (self.own(kernel, problem), *self.wanted(kernel, problem))
        return list(dict.fromkeys(config for *_, config in keys))


def launch(key: Key, shape: TokenShape, call: OperatorCall) -> None:
    """Run the operator once with one configuration, in the kind of launch that has its kernel."""
    kernel, _, config = key
    with forced("fused" if kernel == "fused" else "tiles", **{kernel: config}):
        call(shape, "others" if kernel == "pairs" else "first")


def run(
    shapes: Sequence[TokenShape],
    dtype: str,
    quick: bool,
    out: Path | None,
    seconds: float | None,
    say: Callable[[str], None],
) -> Path:
    """Tune on the current GPU; write the table after every shape, and return its path.

    Args:
        shapes: most important first, as time may end before the last.
        dtype: dtype of the tokens, one of `tuning.DTYPES`.
        quick: measure `candidates.QUICK` configurations of a kernel, not `candidates.MEASURED`.
        out: file of the table; default: the package's own.
        seconds: time after which no measurement starts; default: no limit.
        say: called with each line of the progress.

    Raises:
        ValueError: `seconds` is no time.
        RuntimeError: there is no GPU that the Triton backend can use.
        OSError: the table cannot be written; raised before anything is measured.
    """
    from ..backends import triton_runtime as runtime

    if seconds is not None and not 0 < seconds < float("inf"):
        raise ValueError(f"`seconds` must be a time above 0, got {seconds:g}")
    device = _usable_device()
    launches.settle()  # before anything is launched
    arch = runtime.architecture(device.index)
    # An architecture without limits of its own takes those of its family.
    target = arch if arch in aot.TARGETS else tuning.family(arch)
    path = out or tuning.FOLDER / f"{arch}.json"
    table = tables.start_table(path, arch)
    tables.write(path, table)  # a folder that cannot be written to shows before the work
    end = float("inf") if seconds is None else time.monotonic() + seconds
    keep = QUICK if quick or (seconds is not None and seconds < LITTLE_TIME) else MEASURED
    chosen = Candidates(arch, target, runtime.multiprocessors(device.index), keep)
    say(f"{chosen.known} configurations are known for {target} and this Triton")
    _compile(chosen, shapes, dtype, device, say)

    def bench(shape: TokenShape, reference: Mode) -> Bench:
        return Bench(shape, dtype, device, reference)

    def left() -> float:
        return end - time.monotonic()

    for shape in shapes:
        if left() <= 0:
            say(f"{shape}: no time left")
            continue
        say(f"{shape} {dtype}")
        plan = tuning.plan(arch, *shape.problem(dtype))
        entry = tune_shape(shape, dtype, chosen, plan, bench, say, left)
        if entry is None:
            say(f"{shape}: not enough was measured, the table keeps what it had")
            continue
        table = tables.with_measured(table, entry, tables.machine(device))
        tables.write(path, table)
        say(f"{shape}: {entry['kind']}, {entry['microseconds']}")
    return path


def _usable_device() -> torch.device:
    """The current GPU. Raises RuntimeError if there is none that the Triton backend can use."""
    from ..backends import triton_runtime as runtime

    hint = "; `dry_run` lists what would be measured"
    if not torch.cuda.is_available():
        raise RuntimeError(f"tuning measures on a GPU, and PyTorch finds none{hint}")
    device = torch.device("cuda", torch.cuda.current_device())
    usable, reason = runtime.available(device)
    if not usable or runtime.interpreting():
        raise RuntimeError(f"tuning needs compiled kernels: {reason}{hint}")
    return device


def _compile(
    chosen: Candidates,
    shapes: Sequence[TokenShape],
    dtype: str,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Compile the candidates in parallel; if that fails, each compiles at its launch."""
    from ..functional import negtome

    def call(shape: TokenShape, reference: Mode) -> object:
        size = (shape.items, shape.tokens, shape.channels)
        x = torch.empty(size, dtype=getattr(torch, dtype), device=device)
        return negtome(x, reference, groups=shape.groups, backend="triton")

    started = time.monotonic()
    try:
        count = chosen.prepare(shapes, dtype, call)
        say(f"{count} compiled in {time.monotonic() - started:.1f} s")
    except Exception as error:  # the interfaces of Triton that this uses may change
        say(f"compiling in parallel failed, {type(error).__name__}: {error}".splitlines()[0])
