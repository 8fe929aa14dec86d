"""`negtome_fast.warmup` compiles what will be launched."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from helpers.device import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

import negtome_fast as nf
from negtome_fast.tuner import measure, space


def test_warmup_runs_what_will_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def note(x: torch.Tensor, *, inplace: bool, reference: str) -> None:
        calls.append((tuple(x.shape), x.dtype, inplace, reference))

    # The package has a function of the same name as the module.
    monkeypatch.setattr(importlib.import_module("negtome_fast.warmup"), "negtome", note)
    nf.warmup([(2, 8, 4)], dtype=torch.float16, device="cpu", reference="others")
    both = [((2, 8, 4), torch.float16, inplace, "others") for inplace in (False, True)]
    assert calls == both
    with pytest.raises(ValueError, match=r"a shape must be \(B, N, D\)"):
        nf.warmup([(2, 8)], device="cpu")
    with pytest.raises(ValueError, match="leave out inplace"):
        nf.warmup([(2, 8, 4)], device="cpu", inplace=True)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_after_warmup_nothing_is_compiled_while_a_graph_is_captured() -> None:
    for reference in ("first", "others"):
        nf.warmup([(4, 300, 320)], reference=reference)
        x = measure.random_tokens(
            space.TokenShape(4, 300, 320), torch.bfloat16, torch.device("cuda"), 0
        )
        expected = nf.negtome(x, reference)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = nf.negtome(x, reference)
        graph.replay()
        assert torch.equal(y, expected)
