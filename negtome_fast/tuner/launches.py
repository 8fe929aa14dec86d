"""Compile kernels in parallel, exactly as they are launched, before any of them is launched.

`noting` runs the operator, but its launches only note what Triton would compile. `compile_all`
gives the notes to processes, which fill Triton's cache on disk and report the compiled code. The
launch then finds its code there, so every configuration is compiled once. A process gets the
signature, constants and options of the launch, because all of them are part of the cache's key.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..kernels import aot
from ..kernels.tuning import Config
from .candidates import Key

#: Name of the Triton function of each tuned kernel.
FUNCTIONS = {
    "fused": "fused_kernel",
    "tiles": "tiled_match_kernel",
    "pairs": "tiled_match_kernel",
    "push_from_keys": "push_from_keys_kernel",
}
#: Modules of their functions; a module comes after those that it calls.
MODULES = ("division", "shared", "match", "fused", "push")


def target() -> list[Any]:
    """Backend, architecture and warp size of the device that Triton launches on."""
    from triton.runtime import driver

    current = driver.active.get_current_target()
    return [current.backend, current.arch, current.warp_size]


def settle() -> None:
    """Compute the cache keys of all kernel functions, in the same order in every process.

    The key of a function contains the constants of a called function only if that one's key exists
    already. Otherwise keys would depend on which kernel is launched first, and one process would
    not find the code that another compiled. No effect on kernels that were launched before.
    """
    from triton.runtime import JITFunction

    for name in MODULES:
        module = importlib.import_module(f"{aot.__package__}.{name}")
        for function in vars(module).values():
            if isinstance(function, JITFunction):
                _ = function.cache_key


@contextlib.contextmanager
def not_launching() -> Iterator[None]:
    """Context in which launches only compile; a launch of compiled code does nothing."""
    from triton.compiler import CompiledKernel
    from triton.runtime import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return original(self, *args, grid=grid, warmup=True, **kwargs)

    def nothing(self: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    original, item = JITFunction.run, CompiledKernel.__getitem__
    JITFunction.run, CompiledKernel.__getitem__ = run, nothing
    try:
        yield
    finally:
        JITFunction.run, CompiledKernel.__getitem__ = original, item


@contextlib.contextmanager
def noting(notes: list[str]) -> Iterator[None]:
    """Context in which launches add to `notes` what Triton would compile, and launch nothing.

    A note is Triton's own description of a specialisation: JSON with name, signature, constants,
    attributes and options. Kernels that this process has already compiled leave no note.
    """
    from triton import knobs

    def note(*_: Any, compile: dict[str, Any], **__: Any) -> bool:
        notes.append(compile["specialization_data"])
        return True  # do not compile

    settle()
    hook = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        with not_launching():
            yield
    finally:
        knobs.runtime.jit_cache_hook = hook


def compiled(note: dict[str, Any], device: Sequence[Any]) -> Any:
    """Compile a note for a device, as the launch does."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    settle()
    module, _, name = note["name"].rpartition(".")
    function = getattr(importlib.import_module(module), name)
    constants = zip(map(tuple, note["constant_keys"]), note["constant_vals"], strict=True)
    attributes = zip(map(tuple, note["attrs_keys"]), note["attrs_vals"], strict=True)
    # JSON has lists where Triton has tuples.
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in note["options"].items()}
    return triton.compile(
        ASTSource(function, note["signature"], dict(constants), dict(attributes)),
        target=GPUTarget(*device),
        options=options,
    )


def compile_all(
    arch: str, jobs: Sequence[tuple[Key, Callable[[], object]]]
) -> list[dict[str, Any] | None]:
    """Compile the launches of all jobs in parallel.

    Args:
        arch: the target of `aot.TARGETS` whose limits count.
        jobs: (kernel, dtype, config), and a call that runs the operator with this configuration.

    Returns:
        A row of the compile report for each job. None if the call launches no `kernel`, or only one
        that this process has already compiled.

    Raises:
        RuntimeError: a process failed.
    """
    owners: dict[str, list[int]] = {}
    for number, ((kernel, *_), call) in enumerate(jobs):
        notes: list[str] = []
        with noting(notes):
            call()
        for note in notes:
            # Other kernels, such as the scales, are compiled too; they belong to no job.
            own = json.loads(note)["name"].endswith(f".{FUNCTIONS[kernel]}")
            owners.setdefault(note, []).extend([number] if own else [])
    given = [
        (*(jobs[numbers[0]][0] if numbers else (None, None, None)), json.loads(note))
        for note, numbers in owners.items()
    ]
    device = target()
    workers = max(1, min(os.cpu_count() or 1, len(given)))

    def compile_share(share: Sequence[Any]) -> list[Any]:
        request = json.dumps({"arch": arch, "device": device, "jobs": share})
        return list(json.loads(aot.run_compiling(f"{__package__}.launches", [], request)))

    with ThreadPoolExecutor(max_workers=workers) as pool:
        parts = list(pool.map(compile_share, [given[n::workers] for n in range(workers)]))
    found: list[dict[str, Any] | None] = [None] * len(jobs)
    for position, numbers in enumerate(owners.values()):
        for number in numbers:
            row = parts[position % workers][position // workers]
            found[number] = {**row, "config": list(jobs[number][0][2])}
    return found


def main() -> int:
    """Compile the jobs on the standard input; print a row for each as JSON, or null."""
    request = json.load(sys.stdin)
    rows: list[dict[str, Any] | None] = []
    for kernel, dtype, fields, note in request["jobs"]:

        def compile_note(note: dict[str, Any] = note) -> Any:
            return compiled(note, request["device"])

        if kernel is None:
            with contextlib.suppress(Exception):  # the launch will show the error
                compile_note()
            rows.append(None)
            continue
        config = Config(*fields)
        arch = request["arch"]
        rows.append(aot.row_of(arch, kernel, dtype, config, "as launched", compile_note))
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
