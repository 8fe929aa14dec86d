"""`negtome-fast tune`: search launch configurations on this GPU, write them to a tuning table.

Space -> what can fit by arithmetic -> what compiles without spills and fits by the compile report
-> what is right on random tokens -> what is fastest, under CUDA graphs with rotating inputs.
Without a GPU `--dry-run` goes as far as the compile report. The parts are in `tuner/`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from ..kernels import aot, tuning
from ..kernels.tuning import Config, Problem
from ..provenance import version_of
from ..tuner import compile_report, launches, tables
from ..tuner.candidates import MEASURED, QUICK, Key, Rows, listed, pruned, wanted
from ..tuner.measure import Bench, Mode, forced, tune_shape
from ..tuner.predict import RATES
from ..tuner.space import SHAPES, Shape, parse_shape, space

__all__ = ["SHAPES", "Shape", "dry_run", "forced", "parse_shape", "run"]

#: With fewer seconds than this, only the most promising configurations are measured.
LITTLE_TIME = 300.0
#: How often candidates that compile badly make room for others, before anything is measured.
ROUNDS = 4

Operator = Callable[[Shape, Mode], object]


def dry_run(shapes: Sequence[Shape], dtype: str, arch: str, quick: bool) -> str:
    """The pruned space of every shape as the compile report's table."""
    parts = []
    reports = listed(arch, version_of("triton") or "")
    compiled = partial(compile_report.report_configurations, arch)
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
    """Configurations to measure for a problem: the table's own, and those that compile well."""

    def __init__(self, arch: str, target: str, multiprocessors: int, keep: int) -> None:
        self.arch, self.target = arch, target
        self.multiprocessors, self.keep = multiprocessors, keep
        known = listed(target, version_of("triton") or "")
        self.known = len(known)
        # The good ones are compiled as they are launched, and that has the last word.
        self.reports: Rows = {k: row for k, row in known.items() if compile_report.problems(row)}

    def own(self, kernel: str, problem: Problem) -> Key:
        """The table's plan for the problem."""
        config = tuning.plan(self.arch, *problem).configuration(kernel)
        return kernel, problem.dtype, config

    def wanted(self, kernel: str, problem: Problem, spare: bool = False) -> list[Key]:
        where = (self.target, self.multiprocessors, self.keep)
        return wanted(kernel, problem, *where, self.reports, spare)

    def prepare(self, shapes: Sequence[Shape], dtype: str, call: Operator) -> int:
        """Compile the candidates of all shapes in parallel, as they are launched; how many.

        call: (shape, reference) -> runs the operator once. What compiles badly makes room for what
        comes next, a few times; without a list of what compiles badly, that is many.
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
                        jobs[key] = partial(self._launch, key, shape, call)
            if not jobs:
                break
            rows = launches.compile_all(self.target, list(jobs.items()))
            self.reports |= {key: row for key, row in zip(jobs, rows, strict=True) if row}
            compiled |= set(jobs)
        return len(compiled)

    @staticmethod
    def _launch(key: Key, shape: Shape, call: Operator) -> None:
        kernel, _, config = key
        with forced("fused" if kernel == "fused" else "tiles", **{kernel: config}):
            call(shape, "others" if kernel == "pairs" else "first")

    def __call__(self, kernel: str, problem: Problem) -> list[Config]:
        keys = (self.own(kernel, problem), *self.wanted(kernel, problem))
        return list(dict.fromkeys(config for *_, config in keys))


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
    from ..backends import triton_runtime as runtime
    from ..functional import negtome

    hint = "; `negtome-fast tune --dry-run` lists what would be measured"
    if not torch.cuda.is_available():
        raise RuntimeError(f"tuning measures on a GPU, and PyTorch finds none{hint}")
    device = torch.device("cuda", torch.cuda.current_device())
    usable, reason = runtime.available(device)
    if not usable or runtime.interpreting():
        raise RuntimeError(f"tuning needs compiled kernels: {reason}{hint}")
    launches.settle()  # before anything is launched
    arch = runtime.architecture(device.index)
    # An architecture without limits of its own is pruned by those of its family.
    target = arch if arch in aot.TARGETS else tuning.family(arch)
    path = out or tuning.FOLDER / f"{arch}.json"
    table = tables.start_table(path, arch)
    tables.write(path, table)  # a folder that cannot be written to shows before the work
    end = float("inf") if seconds is None else time.monotonic() + seconds
    keep = QUICK if quick or (seconds is not None and seconds < LITTLE_TIME) else MEASURED
    chosen = Candidates(arch, target, runtime.multiprocessors(device.index), keep)

    def left() -> float:
        return end - time.monotonic()

    def operator(shape: Shape, reference: Mode) -> object:
        size = (shape.items, shape.tokens, shape.channels)
        x = torch.empty(size, dtype=getattr(torch, dtype), device=device)
        return negtome(x, reference, groups=shape.groups, backend="triton")

    say(f"{chosen.known} configurations are known for {target} and this Triton")
    started = time.monotonic()
    try:
        count = chosen.prepare(shapes, dtype, operator)
        say(f"{count} compiled in {time.monotonic() - started:.1f} s")
    except Exception as error:  # Triton's interfaces may differ; then each compiles at its launch
        say(f"compiling in parallel failed, {type(error).__name__}: {error}".splitlines()[0])

    for shape in shapes:
        if left() <= 0:
            say(f"{shape}: no time left")
            continue
        say(f"{shape} {dtype}")
        entry = tune_shape(
            shape,
            dtype,
            chosen,
            tuning.plan(arch, *shape.problem(dtype)),
            lambda shape, reference: Bench(shape, dtype, device, reference),
            say,
            left,
        )
        if entry is None:
            say(f"{shape}: not enough was measured, the table keeps what it had")
            continue
        facts = tables.machine(device)
        merged = {**table, "machine": facts, "note": "measured"}
        table = tables.merge(merged, {**entry, "machine": facts})
        tables.write(path, table)
        say(f"{shape}: {entry['kind']}, {entry['microseconds']}")
    return path
