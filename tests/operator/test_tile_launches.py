"""Launches of tiles: overlap with the push, flattened loops, the second stream, kept launches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.device import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from negtome_fast.backends import triton_backend, triton_geometry, triton_launch, triton_streams
from negtome_fast.backends.triton_streams import SideStream
from negtome_fast.functional import guide_tokens
from negtome_fast.kernels import tuning

ITEMS, TOKENS, CHANNELS = 4, 70, 32
#: 5 blocks of rows: two whole bands of GROUP_M and one that is not.
TILE = tuning.Config(16, 32, 16, 4, 1, GROUP_M=2)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    return (noise + torch.randn(shape[-1], generator=generator) * 0.8).to(torch.float16).to(DEVICE)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Match by tiles with other fields of the configuration."""
    unforced = tuning.plan

    def force(**fields: int) -> None:
        def forced(*problem: Any) -> tuning.Plan:
            config = TILE._replace(**fields)
            return unforced(*problem)._replace(kind="tiles", tiles=config, pairs=config)

        monkeypatch.setattr(tuning, "plan", forced)

    return force


CALLS: dict[str, dict[str, Any]] = {
    "first": {},
    "first, groups, in place": {"groups": 2, "inplace": True},
    "others, groups": {"reference": "others", "groups": 2},
    "one item a group": {"groups": ITEMS - ITEMS // 2, "reference": "first"},
    "shared references": {"reference": tokens(3, 40, CHANNELS, seed=1)},
    "references per item, in place": {
        "reference": tokens(ITEMS, 2, 40, CHANNELS, seed=2),
        "inplace": True,
    },
}


def results(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    x = tokens(ITEMS, TOKENS, CHANNELS)
    return guide_tokens(x, threshold=0.3, backend="triton", **arguments)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("fields", [{"OVERLAP": 1}, {"DESCRIPTORS": 1, "FLATTEN": 1}])
def test_how_tiles_are_launched_changes_nothing(
    tiles: Any, name: str, fields: dict[str, int], poisoned: None
) -> None:
    tiles()
    expected = results(CALLS[name])
    assert bool((expected[2] >= 0).any())
    tiles(**fields)
    for actual, wanted in zip(results(CALLS[name]), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_overlap_matches_the_last_items_beside_the_push_of_the_others(
    tiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    original = triton_launch.Launch.__call__

    def note(launch: triton_launch.Launch, *arguments: Any) -> None:
        made.append(launch.kernel.__name__.removesuffix("_kernel"))
        original(launch, *arguments)

    monkeypatch.setattr(triton_launch.Launch, "__call__", note)
    tiles(OVERLAP=1)
    triton_geometry._known.clear()
    results({})
    # Few tokens: nothing covers much. Item 0 is the reference: copied, not matched.
    assert made == ["scale", "push_from_keys", "tiled_match", "push_from_keys"]
    made.clear()
    triton_geometry._known.clear()
    monkeypatch.setattr(triton_geometry, "PUSH_BY_MATCHING", 1)
    results({})
    assert made == ["scale", *["tiled_match", "push_from_keys"] * 2]
    (known,) = triton_geometry._known.values()
    assert known.parts == ((0, 3), (3, 1))
    triton_geometry._known.clear()


def test_the_second_stream_is_forked_and_joined_by_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By stand-ins for streams: each push waits for its matches, the caller for all pushes."""
    order: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            order.append(f"{self.name} waits for {other.name}")

        def __enter__(self) -> None:
            order.append(f"on {self.name}")

        def __exit__(self, *_: object) -> None:
            order.append(f"off {self.name}")

    cuda = SimpleNamespace(
        current_stream=lambda device: Stream("main"),
        Stream=lambda device: Stream("side"),
        stream=lambda stream: stream,
    )
    monkeypatch.setattr(triton_streams.torch, "cuda", cuda)
    triton_streams._side_stream.cache_clear()
    x: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    try:
        with SideStream(x) as side:
            for number in range(2):
                order.append(f"match {number}")
                with side.following():
                    order.append(f"push {number}")
        one = ["side waits for main", "on side", "push {}", "off side"]
        expected = [line.format(number) for number in range(2) for line in ("match {}", *one)]
        assert order == [*expected, "main waits for side"]

        order.clear()
        with pytest.raises(RuntimeError, match="no memory"), SideStream(x) as side:
            with side.following():
                order.append("push")
            raise RuntimeError("no memory")
        assert order[-1] == "main waits for side"
    finally:
        triton_streams._side_stream.cache_clear()


def test_launches_are_kept_for_calls_alike_and_remade_for_another_plan(tiles: Any) -> None:
    tiles()
    triton_geometry._known.clear()
    results({})
    (kept,) = triton_geometry._known.values()
    tiles_of = kept.tiles
    results({})
    assert next(iter(triton_geometry._known.values())) is kept and kept.tiles is tiles_of
    tiles(OVERLAP=1)
    results({})
    (remade,) = triton_geometry._known.values()
    assert remade is not kept and len(remade.push_from_keys) == 2


def test_compiled_kernels_are_launched_only_for_aligned_pointers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_launch.runtime, "interpreting", lambda: False)
    calls: list[tuple[str, tuple[Any, ...]]] = []

    class Compiled:
        packed_metadata = ()

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments: calls.append(("compiled", arguments))

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*arguments: Any, **options: Any) -> Compiled:
                calls.append(("examined", arguments))
                assert grid == (3, 2, 1) and options == {"num_warps": 4}
                return Compiled()

            return run

    launch = triton_launch.Launch(Kernel(), (3, 2), (7, 8), ("first", 16), (("num_warps", 4),))
    for aligned in (False, True, True, False):
        launch(aligned, "x", None)
    assert [kind for kind, _ in calls] == ["examined", "examined", "compiled", "examined"]
    assert all(arguments == ("x", None, 7, 8, "first", 16) for _, arguments in calls)


def test_numbers_of_the_host_are_no_tensors_of_the_device() -> None:
    x = tokens(2, 3, CHANNELS)
    number, vector = torch.tensor(0.5), torch.tensor([0.5, 0.25])
    assert triton_backend._per_slot((number, number), x) == ((0.5, 0.5), (0, 0))
    values, strides = triton_backend._per_slot((number, vector), x)
    assert strides == (0, 1)
    assert all(isinstance(value, Tensor) and value.device == x.device for value in values)
