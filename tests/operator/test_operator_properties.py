"""Random calls against the fp64 oracle; a file by itself because it needs hypothesis."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.cases import tokens
from helpers.device import BACKENDS, DEVICE
from helpers.oracle import Problem
from negtome_fast.functional import guide_tokens


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    items=st.integers(1, 4),
    size=st.integers(1, 40),
    channels=st.integers(1, 40),
    reference_tokens=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    alpha=st.floats(-2, 2),
    threshold=st.floats(-1, 1),
    kind=st.sampled_from(["external", "per item", "others", "first"]),
    groups=st.sampled_from([1, 2]),
    matching=st.sampled_from(["paper", "official"]),
    with_source_mask=st.booleans(),
    combine=st.sampled_from(["nearest", "sum"]),
    with_mask=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    backend=st.sampled_from(BACKENDS),
)
def test_any_problem_is_right(
    items: int,
    size: int,
    channels: int,
    reference_tokens: int,
    seed: int,
    alpha: float,
    threshold: float,
    kind: str,
    groups: int,
    matching: str,
    with_source_mask: bool,
    combine: str,
    with_mask: bool,
    dtype: torch.dtype,
    backend: str,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    if kind in ("others", "first"):
        items = groups * max(items, 2)
    else:
        groups = 1
    if matching == "official":
        reference_tokens = size
    x = tokens(generator, (items, size, channels), dtype).to(DEVICE)
    arguments: dict[str, Any] = {
        "alpha": alpha,
        "threshold": threshold,
        "combine": combine,
        "matching": matching,
        "groups": groups,
    }
    if with_source_mask:
        arguments["source_mask"] = (torch.rand(size, generator=generator) < 0.5).to(DEVICE)
    length = size
    if kind in ("external", "per item"):
        length = reference_tokens
        shape = (2, length, channels) if kind == "external" else (items, 2, length, channels)
        arguments["reference"] = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    else:
        arguments["reference"] = kind
    if with_mask:
        arguments["reference_mask"] = (torch.rand(length, generator=generator) < 0.5).to(DEVICE)
        if kind in ("external", "per item"):
            arguments["reference_mask"] = arguments["reference_mask"].expand(2, -1)
    if backend == "triton" and dtype == torch.float64:
        backend = "torch"
    Problem(x, arguments).check_guide(*guide_tokens(x, **arguments, backend=backend))
