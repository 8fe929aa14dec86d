"""Threads of the torch backend on a CPU: a call is split once, and each thread computes alone.

torch splits every operator among its threads, and an operator ends when its slowest thread does. If
other processes or a quota take a processor away, a call of hundreds of operators waits hundreds of
times. Here one thread of a pool leads a call, and others take blocks of its rows as they become
free, so that it waits a few times in all. Blocks do not depend on the number of threads, so results
do not either.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")
#: Libraries and their functions that set the number of threads for the calling thread alone;
#: `torch.set_num_threads` also sets the default of every thread that starts later.
LIBRARIES = ("libtorch_cpu.so", "libtorch_cpu.dylib", "libiomp5md.dll", "torch_cpu.dll")
SETTERS = ("omp_set_num_threads", "MKL_Set_Num_Threads_Local")


class _Cancelled(Exception):
    """Raised in a task whose caller no longer waits."""


class _Modes(NamedTuple):
    """Thread-local modes of torch and the processor that results could depend on."""

    inference: bool
    flush_denormal: bool

    @classmethod
    def current(cls) -> _Modes:
        smallest = sys.float_info.min
        return cls(torch.is_inference_mode_enabled(), smallest * 0.5 == 0.0)

    def call(self, function: Callable[..., T], *arguments: object) -> T:
        torch.set_flush_denormal(self.flush_denormal)
        with torch.inference_mode(self.inference), torch.no_grad():
            return function(*arguments)


class _Region:
    """Indices that threads take one after another, until none is left or a task has failed."""

    def __init__(self, count: int, task: Callable[[int, int], object], stop: threading.Event):
        self._count, self._task, self._stop = count, task, stop
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        self._next = self._members = self._running = 0
        self._error: BaseException | None = None

    def work(self) -> None:
        """Take indices until none is left."""
        with self._lock:
            if self._next >= self._count:
                return
            member = self._members
            self._members += 1
            self._running += 1
        try:
            while (index := self._take()) is not None:
                self._task(member, index)
        except BaseException as error:
            with self._lock:
                self._error, self._next = self._error or error, self._count
        finally:
            with self._lock:
                self._running -= 1
                self._quiet.notify_all()

    def _take(self) -> int | None:
        with self._lock:
            if self._stop.is_set():
                self._next = self._count
            if self._next >= self._count:
                return None
            self._next += 1
            return self._next - 1

    def finish(self) -> None:
        """Wait for the indices that other threads took; raise what a task raised."""
        with self._quiet:
            self._quiet.wait_for(lambda: self._running == 0)
        # Threads that start late still hold the region, but must not hold its tensors.
        del self._task
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error
        if self._stop.is_set():
            raise _Cancelled


class Team:
    """Threads that share the work of one call: one leads, `size - 1` help."""

    def __init__(self, size: int = 1, pool: ThreadPoolExecutor | None = None) -> None:
        self.size = size
        self._pool = pool
        self._modes = _Modes.current() if pool else None
        self._stop = threading.Event()

    def each(self, count: int, task: Callable[[int, int], object]) -> None:
        """Call `task(member, index)` for every index below `count`, begun in ascending order.

        `member`, a number below `size`, belongs to one thread at a time. If a task raises, further
        indices are skipped and the error is raised here. In a team of one, this is a loop.
        """
        if self._pool is None or self._modes is None or count < 2:
            for index in range(count):
                task(0, index)
            return
        region = _Region(count, task, self._stop)
        for _ in range(min(self.size, count) - 1):
            try:
                self._pool.submit(self._modes.call, region.work)
            except RuntimeError:  # The pool is closed, or the system has no more threads.
                break
        region.work()
        region.finish()

    def cancel(self) -> None:
        """Let no further task begin."""
        self._stop.set()

    def lead(self, function: Callable[[Team], T]) -> T:
        assert self._modes is not None
        return self._modes.call(function, self)


ALONE = Team()


class _Pool:
    """The threads of this process: as many as the largest call has asked for so far."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._size = 0
        self._usable = True

    def get(self, size: int) -> ThreadPoolExecutor | None:
        """Return a pool of at least `size` threads; None if they cannot compute alone."""
        with self._lock:
            if self._usable and size > self._size:
                if self._executor is not None:
                    self._executor.shutdown(wait=False)
                self._executor = ThreadPoolExecutor(size, "negtome_fast", _compute_alone)
                self._size = size
                self._usable = self._executor.submit(_computes_alone).result()
            return self._executor if self._usable else None


_pool = _Pool()


def _forget() -> None:
    """Forget the pool: a forked process has none of its parent's threads."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _compute_alone() -> None:
    """Make the operators that this thread calls use no other thread."""
    torch.get_num_threads()  # This takes over the default, which would later undo what follows.
    folder = Path(torch.__file__).parent / "lib"
    for name in (None, *(str(folder / name) for name in LIBRARIES if (folder / name).exists())):
        try:
            library = ctypes.CDLL(name)
        except (OSError, TypeError):  # Windows has no library without a name.
            continue
        for setter in SETTERS:
            if hasattr(library, setter):
                getattr(library, setter)(ctypes.c_int(1))


def _computes_alone() -> bool:
    """Return True if `_compute_alone` has worked for torch's operators and its matrix library."""
    lines = torch.__config__.parallel_info().splitlines()
    counts = [line.split(":")[-1].strip() for line in lines if "max_threads()" in line]
    return torch.get_num_threads() == 1 and bool(counts) and set(counts) == {"1"}


def conduct(function: Callable[[Team], T]) -> T:
    """Return `function(team)`, with as many threads as the caller's `torch.get_num_threads()`.

    With one thread, or if torch's threads cannot be set one by one, the caller runs it alone.
    Otherwise it runs on a thread of the pool, under the caller's inference mode and without
    gradients, while the caller waits. After an interrupt no further task begins.
    """
    size = torch.get_num_threads()
    future: Future[T] | None = None
    team = ALONE
    if size > 1:
        try:
            executor = _pool.get(size)
            if executor is not None:
                team = Team(size, executor)
                future = executor.submit(team.lead, function)
        except RuntimeError:  # The interpreter ends, or the system has no more threads.
            future = None
    if future is None:
        return function(ALONE)
    try:
        return future.result()
    except BaseException:
        team.cancel()
        wait([future])
        raise
    finally:
        del future
