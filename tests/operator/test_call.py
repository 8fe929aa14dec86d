"""The way of one call from `negtome` to a kernel is short, with and without torch's dispatcher."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

from helpers.device import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

import triton

import negtome_fast as nf
from negtome_fast import functional, kernels
from negtome_fast.kernels import tuning

PACKAGE = Path(nf.__file__).parent
KERNELS = Path(kernels.__file__).parent
TRITON = Path(triton.__file__).parent
#: guide_tokens, the operator or `ops.run`, the backend, the launch.
MOST_CALLS = 4
#: Name, kind of launch, arguments.
CALLS: list[tuple[str, str, dict[str, Any]]] = [
    ("first", "rows", {}),
    ("first", "tiles", {}),
    ("first", "overlapping tiles", {}),
    ("first, in place", "tiles", {"inplace": True}),
    ("others", "tiles", {"reference": "others"}),
    ("others, sum", "tiles", {"reference": "others", "combine": "sum"}),
    ("official", "tiles", {"matching": "official"}),
    ("external", "rows", {"reference": torch.ones(2, 20, 16, device=DEVICE)}),
]


@cache
def _is_ours(code: CodeType) -> bool:
    path = Path(code.co_filename)
    return path.is_relative_to(PACKAGE) and not path.is_relative_to(KERNELS)


def calls_before_kernels(x: torch.Tensor, arguments: dict[str, Any]) -> list[list[str]]:
    """For each launch: our functions that are running, without `negtome`, the launch's last."""
    found: list[list[str]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        caller = frame.f_back
        if event != "call" or caller is None or not _is_ours(caller.f_code):
            return
        if not Path(frame.f_code.co_filename).is_relative_to(TRITON):
            return
        running: list[str] = []
        walked: FrameType | None = caller
        while walked is not None and walked.f_code is not functional.negtome.__code__:
            if _is_ours(walked.f_code):
                running.insert(0, walked.f_code.co_qualname)
            walked = walked.f_back
        found.append(running)

    nf.negtome(x, **arguments)  # Compiles, and makes what is kept for such calls.
    sys.setprofile(note)
    try:
        nf.negtome(x, **arguments)
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("dispatched", [False, True], ids=["plain", "torch.library"])
@pytest.mark.parametrize(
    ("kind", "arguments"), [case[1:] for case in CALLS], ids=[" by ".join(c[:2]) for c in CALLS]
)
def test_few_calls_lie_between_negtome_and_a_kernel(
    kind: str, arguments: dict[str, Any], dispatched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    unforced = tuning.plan

    def forced(*problem: Any) -> tuning.Plan:
        chosen = unforced(*problem)
        tiles = chosen.tiles._replace(OVERLAP=int(kind.startswith("overlapping")))
        return chosen._replace(kind=kind.split()[-1], tiles=tiles)

    monkeypatch.setattr(tuning, "plan", forced)
    x = torch.randn(4, 20, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    operator = "guide_" if "inplace" in arguments else "guide"
    if dispatched:
        # The dispatcher may not be skipped for a subclass of tensors.
        x = torch.nn.Parameter(x, requires_grad=False)
    launches = calls_before_kernels(x, {"backend": "triton", "threshold": 0.0, **arguments})
    assert len(launches) >= 2
    for running in launches:
        assert running[0] == "guide_tokens" and running[-1] == "Launch.__call__"
        assert running[1] == (operator if dispatched else "run")
        assert len(running) <= MOST_CALLS, " -> ".join(running)
