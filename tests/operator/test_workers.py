"""Threads of the large CPU path: the same bits for any number; the caller's modes are untouched."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import negtome_fast as nf
from bench.compared.shapes import Shape, random_tokens
from negtome_fast.backends import coarse, pieces, small, torch_backend, workers
from negtome_fast.functional import guide_tokens

ROOT = Path(__file__).parents[2]
THREADS = (1, 2, 3, 5)


def pool_works() -> bool:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return workers.conduct(lambda team: team.size) == 2
    finally:
        torch.set_num_threads(before)


needs_pool = pytest.mark.skipif(
    not pool_works(), reason="threads of this build of torch cannot be set one by one"
)


@pytest.fixture
def large(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every call as a large one, split into many tasks."""
    monkeypatch.setattr(small, "SMALL", 0)
    monkeypatch.setattr(torch_backend, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(coarse, "LEAST_CHANNELS", 1)
    monkeypatch.setattr(coarse, "LEAST_TOKENS", 64)
    monkeypatch.setattr(coarse, "LEAST_WORK", 0)
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 2000)
    for name, value in {"BLOCK_COLUMNS": 128, "ROWS": 32, "FIRST_ROWS": 16}.items():
        monkeypatch.setattr(coarse, name, value)


def hidden_states(dtype: torch.dtype = torch.float32, independent: bool = False) -> Tensor:
    return random_tokens(Shape("", 3, 300, 48, independent=independent), dtype, "cpu")


@needs_pool
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"reference": "others"}, {"matching": "official"}],
    ids=str,
)
@pytest.mark.parametrize("independent", [False, True])
def test_same_bits_for_any_number_of_threads(
    int8: bool,
    dtype: torch.dtype,
    arguments: dict,
    independent: bool,
    large: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coarse, "has_int8_products", lambda: int8)
    x = hidden_states(dtype, independent)
    # Half of the rows of the last item are all alike in the int8 product, which is then given up.
    x[2, 150:] = x[2, 150:151] + 1e-3 * x[2, 150:]
    expected = None
    for number in THREADS:
        torch.set_num_threads(number)
        for _ in range(2):
            found = guide_tokens(x, **arguments, backend="torch")
            if arguments.get("matching") != "official":
                moved = nf.negtome(x.clone(), **arguments, backend="torch", inplace=True)
                assert torch.equal(moved, found[0])
            if expected is None:
                expected = found
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)


@needs_pool
def test_products_after_one_in_vain_do_not_count(
    large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coarse, "has_int8_products", lambda: True)
    monkeypatch.setattr(coarse, "BLOCK_COLUMNS", 512)
    x = hidden_states()
    x[1, : coarse.FIRST_ROWS] = 0  # equally far from everything
    decide, others = coarse._decide, threading.Semaphore(0)
    rows: list[int] = []

    def late(some: Tensor, *rest: object) -> object:
        decided = decide(some, *rest)  # type: ignore[arg-type]
        rows.append(len(some))
        if torch.get_num_threads() == 1 and threading.current_thread() is not alone:
            if len(some) == coarse.FIRST_ROWS:
                assert others.acquire(timeout=20) and others.acquire(timeout=20)
            others.release()
        return decided

    monkeypatch.setattr(coarse, "_decide", late)
    alone = threading.current_thread()
    torch.set_num_threads(1)
    expected = guide_tokens(x, backend="torch")
    assert rows == [coarse.FIRST_ROWS]
    torch.set_num_threads(2)
    found = guide_tokens(x, backend="torch")
    assert len(rows) >= 4  # The first one, that in vain, and two that another thread has done.
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@needs_pool
@pytest.mark.parametrize("number", THREADS)
def test_lowest_of_equal_tokens_is_chosen(number: int, large: None) -> None:
    some = torch.randn(3, 37, 48, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(number)
    _, _, pushed = guide_tokens(some.repeat(1, 10, 1), threshold=-1.0, backend="torch")
    assert int(pushed[1:].max()) < 37


@needs_pool
@pytest.mark.parametrize("inference", [False, True])
def test_callers_modes_hold_in_every_thread(inference: bool, threads: None) -> None:
    torch.set_num_threads(3)
    seen = []

    def look(*_: int) -> None:
        seen.append(
            (
                torch.get_num_threads(),
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.tensor(1e-39).mul(1.0).item() == 0.0,
            )
        )

    with torch.inference_mode(inference), torch.autocast("cpu", torch.bfloat16):
        flushed = torch.set_flush_denormal(True)
        try:
            workers.conduct(lambda team: (look(), team.each(12, look)))
        finally:
            torch.set_flush_denormal(False)
        workers.conduct(lambda team: team.each(12, look))
    assert set(seen[:13]) == {(1, False, inference, False, flushed)}
    assert set(seen[13:]) == {(1, False, inference, False, False)}
    assert len(seen) == 25


@needs_pool
def test_threads_of_the_caller_and_of_later_threads_stay(large: None) -> None:
    torch.set_num_threads(3)
    x = hidden_states()
    nf.negtome(x, backend="torch")
    with pytest.raises(ZeroDivisionError):
        workers.conduct(lambda team: team.each(5, lambda *_: 1 // 0))
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(torch.get_num_threads).result() == 3


@needs_pool
@pytest.mark.parametrize("number", THREADS)
def test_exception_reaches_the_caller_and_ends_the_work(number: int, threads: None) -> None:
    torch.set_num_threads(number)
    begun = []

    def fail(member: int, index: int) -> None:
        assert 0 <= member < number
        begun.append(index)
        if index == 3:
            raise LookupError("index 3")

    with pytest.raises(LookupError, match="index 3"):
        workers.conduct(lambda team: team.each(1000, fail))
    assert len(begun) < 1000 or number > 1
    assert workers.conduct(lambda team: 7) == 7


@needs_pool
def test_every_index_is_taken_once_and_in_order(threads: None) -> None:
    torch.set_num_threads(5)
    taken: list[int] = []
    lock = threading.Lock()
    members = set()

    def take(member: int, index: int) -> None:
        with lock:
            taken.append(index)
            members.add(member)
        torch.randn(1000).sum()

    workers.conduct(lambda team: team.each(500, take))
    assert sorted(taken) == list(range(500))
    assert members <= set(range(5))


@needs_pool
def test_waiting_caller_that_is_interrupted_leaves_nothing_running(
    threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    begun, go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def slow(_: int, index: int) -> None:
        begun.set()
        go_on.wait(10)
        done.append(index)

    def interrupted(future: object, timeout: float | None = None) -> None:
        assert begun.wait(10)
        # The tasks that have begun end while the caller waits for them.
        threading.Timer(0.2, go_on.set).start()
        raise KeyboardInterrupt

    workers.conduct(lambda team: team.size)  # The pool is there.
    monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workers.conduct(lambda team: team.each(1000, slow))
    after = len(done)
    assert 1 <= after <= 3
    monkeypatch.undo()
    workers.conduct(lambda team: team.each(10, lambda *_: None))
    assert len(done) == after


@needs_pool
def test_calls_within_calls_and_from_many_threads(large: None) -> None:
    torch.set_num_threads(2)
    x = hidden_states()
    expected = nf.negtome(x, backend="torch")
    nested: list[Tensor] = []

    def call(*_: int) -> None:
        nested.append(nf.negtome(x, backend="torch"))

    workers.conduct(lambda team: team.each(4, call))
    with ThreadPoolExecutor(6) as users:
        jobs = [users.submit(nf.negtome, x, backend="torch") for _ in range(18)]
        found = [job.result(timeout=120) for job in jobs]
    assert len(nested) == 4
    assert all(torch.equal(one, expected) for one in nested + found)


def _child(x: Tensor, queue: object) -> None:
    # No operator here may use torch's own threads: its library does not survive a fork.
    y = nf.negtome(x, backend="torch")
    queue.put((workers.conduct(lambda team: team.size), y.numpy().tobytes()))  # type: ignore[attr-defined]


@needs_pool
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_process_has_threads_of_its_own(large: None) -> None:
    torch.set_num_threads(2)
    x = hidden_states()
    expected = nf.negtome(x, backend="torch").numpy().tobytes()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(x, queue))
    child.start()
    try:
        assert queue._reader.poll(60)
        assert queue.get() == (2, expected)
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()


ALONE_IN_EVERY_THREAD = """
import os, threading
import torch
import negtome_fast as nf
torch.set_num_threads(1)
x = torch.randn(3, 1200, 640)
x[1:] += x[:1]
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
python = threading.active_count()
y = nf.negtome(x, backend="torch")
more = len(os.listdir("/proc/self/task")) - before
print(more, threading.active_count() - python)
"""


@needs_pool
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads cannot be counted")
def test_no_operator_of_a_large_call_waits_for_other_threads() -> None:
    # The OpenMP library starts its threads in the first region that has more than one, and keeps
    # them: what stands here besides the pool's are threads that every such region waits for.
    done = subprocess.run(
        [sys.executable, "-c", ALONE_IN_EVERY_THREAD],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
    )
    threads, of_the_pool = map(int, done.stdout.split())
    assert 1 <= of_the_pool <= 3
    assert threads == of_the_pool


AT_THE_END = """
import atexit, sys, threading
import torch
import negtome_fast as nf
from negtome_fast.backends import workers
torch.set_num_threads(2)
x = torch.randn(3, 1100, 640)
nf.negtome(x, backend="torch")
atexit.register(lambda: print(nf.negtome(x, backend="torch").shape[0], flush=True))
def forever():
    while True:
        nf.negtome(x, backend="torch")
threading.Thread(target=forever, daemon=True).start()
"""


@needs_pool
def test_interpreter_ends_while_a_call_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["3"], done.stderr


def test_build_whose_threads_cannot_be_set_one_by_one(
    threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SETTERS", ())
    monkeypatch.setattr(workers, "_pool", workers._Pool())
    torch.set_num_threads(2)
    seen = []
    result = workers.conduct(
        lambda team: (team.size, team.each(3, lambda *place: seen.append(place)))
    )
    assert result == (1, None)
    assert seen == [(0, 0), (0, 1), (0, 2)]
    assert not workers._pool.get(2)
