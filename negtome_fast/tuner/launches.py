"""Compile kernels as they are launched, in parallel, before any of them is launched.

`noting` runs the operator with launches that only note what Triton would compile; `compile_all`
hands the notes to processes, which fill Triton's cache on disk and report what came out. The launch
then finds its code there: every configuration is compiled once. A process gets signature, constants
and options exactly as the launch has them, since the cache is asked by all of them.
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

#: The function that a tuned kernel is, by the name that Triton gives it.
FUNCTIONS = {
    "fused": "fused_kernel",
    "tiles": "tiled_match_kernel",
    "pairs": "tiled_match_kernel",
    "push_from_keys": "push_from_keys_kernel",
}
#: Where their functions are, those that are called first.
MODULES = ("division", "shared", "match", "fused", "push")


def target() -> list[Any]:
    """Backend, architecture and warp size of the device that Triton launches on."""
    from triton.runtime import driver

    current = driver.active.get_current_target()
    return [current.backend, current.arch, current.warp_size]


def settle() -> None:
    """Let Triton give all functions of the kernels their keys, in one order in every process.

    The key of a function has the constants of those it calls only where these have theirs already,
    so keys depend on which kernel is launched first, and what one process compiles another may not
    find. Has no effect on kernels that were launched before.
    """
    from triton.runtime import JITFunction

    for name in MODULES:
        module = importlib.import_module(f"{aot.__package__}.{name}")
        for function in vars(module).values():
            if isinstance(function, JITFunction):
                _ = function.cache_key


@contextlib.contextmanager
def not_launching() -> Iterator[None]:
    """Inside, launches end when the kernel is compiled; what is compiled already does nothing."""
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
    """Inside, no kernel is launched; what Triton would have to compile for it is added to `notes`.

    A note is Triton's own description of a specialisation, JSON that holds name, signature,
    constants, attributes and options. Kernels that this process has compiled leave none.
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
    """Compile a note for a device, by the same call as at the launch."""
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
    """Compile what each job launches, all in one go; a row of the compile report for each job.

    arch: whose limits count (`aot.TARGETS`). jobs: (kernel, dtype, config), and a call that runs
    the operator with that configuration. A row is None where the call launches nothing of `kernel`
    that this process has not compiled before.

    Raises RuntimeError where a process fails.
    """
    owners: dict[str, list[int]] = {}
    for number, ((kernel, *_), call) in enumerate(jobs):
        notes: list[str] = []
        with noting(notes):
            call()
        for note in notes:
            # Others are compiled along, such as the scales; they are nobody's.
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
    """Compile the jobs on the standard input; print a row for each, None for nobody's, as JSON."""
    request = json.load(sys.stdin)
    rows: list[dict[str, Any] | None] = []
    for kernel, dtype, fields, note in request["jobs"]:

        def compile_note(note: dict[str, Any] = note) -> Any:
            return compiled(note, request["device"])

        if kernel is None:
            with contextlib.suppress(Exception):  # its launch tells
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
