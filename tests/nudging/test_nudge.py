"""`nudge` against its definition by autograd: closed forms, properties, errors, compilers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import negtome_fast as nf
from helpers.device import BACKENDS, DEVICE
from negtome_fast.nudging import nudge, ops

SHAPE = (4, 6, 7)
OBJECTIVES = ("paper", "squared", "cosine")
STEP = {"paper": 0.1, "squared": 1.0, "cosine": 0.03}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=random)).to(DEVICE, dtype)


def problem(
    objective: str, dtype: torch.dtype, shared: bool = True
) -> tuple[Tensor, dict[str, Any]]:
    sets = () if shared else (3,)
    return draw(0, 3, *SHAPE, dtype=dtype), {
        "desired": draw(1, 2, *SHAPE, dtype=dtype, scale=0.3),
        "undesired": draw(2, *sets, 5, *SHAPE, dtype=dtype, scale=0.5),
        "objective": objective,
        "beta": 3.0,
        "step_size": STEP[objective],
        "steps": 6,
        "return_trace": True,
    }


def oracle(latents: Tensor, arguments: dict[str, Any]) -> nf.nudging.NudgeResult:
    """Result of the definition in fp64, on the values that were rounded to their dtype."""
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return nudge(latents.double(), backend="reference", **wide)


@pytest.mark.parametrize("max_distance", [None, 2.0], ids=["free", "radius"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per item"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_takes_the_defined_steps(
    backend: str, objective: str, dtype: torch.dtype, shared: bool, max_distance: float | None
) -> None:
    latents, arguments = problem(objective, dtype, shared)
    arguments["max_distance"] = max_distance
    expected = oracle(latents, arguments)
    result = nudge(latents, backend=backend, **arguments)
    assert result.latents.dtype == dtype and result.latents.shape == latents.shape
    assert torch.equal(result.steps, expected.steps)
    assert result.reasons == expected.reasons
    torch.testing.assert_close(result.distance.double(), expected.distance, rtol=1e-5, atol=1e-6)
    assert result.trace is not None and expected.trace is not None
    torch.testing.assert_close(result.trace.double(), expected.trace, rtol=1e-5, atol=1e-4)
    # One rounding to the dtype, of a value that is right to fp32.
    error = (result.latents.double() - expected.latents).abs()
    limit = torch.finfo(dtype).eps / 2 * expected.latents.abs() + 1e-5
    assert bool((error <= limit).all()), error.max()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_latents_of_fp16_stay_finite(backend: str, objective: str) -> None:
    latents, arguments = problem(objective, torch.float16)
    latents = (2e4 * latents).clamp(-65504, 65504)
    arguments.update(beta=1e5, step_size=50.0 if objective == "cosine" else 0.1)
    expected = oracle(latents, arguments)
    result = nudge(latents, backend=backend, **arguments)
    assert bool(result.latents.isfinite().all()) and bool((result.latents.abs() == 65504).any())
    wanted = expected.latents.clamp(-65504, 65504)
    torch.testing.assert_close(result.latents.double(), wanted, rtol=2e-3, atol=50)


@pytest.mark.parametrize("objective", ["paper", "cosine"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_step_beyond_the_range_of_fp32_is_not_taken(backend: str, objective: str) -> None:
    latents, arguments = problem(objective, torch.float32)
    arguments.update(beta=1e9, step_size=1e10 if objective == "paper" else 1e30)
    result = nudge(latents, backend=backend, **arguments)
    assert result.reasons == ("non-finite",) * 3
    assert bool(result.latents.isfinite().all()) and bool(result.distance.isfinite().all())
    assert result.trace is not None and bool(result.trace.isfinite().all())


def test_the_cases_stop_for_different_reasons() -> None:
    seen = set()
    for objective in OBJECTIVES:
        for radius in (None, 2.0):
            latents, arguments = problem(objective, torch.float32)
            seen.update(nudge(latents, max_distance=radius, **arguments).reasons)
    assert seen == {"converged", "steps", "distance"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_squared_is_the_minimum_in_closed_form(backend: str) -> None:
    latents, desired, undesired = draw(0, 2, 9), draw(1, 4, 9), draw(2, 3, 9)
    result = nudge(
        latents, desired, undesired, alpha=0.5, beta=2.0, objective="squared", backend=backend
    )
    g = -0.5 * desired.mean(0) + 2.0 * undesired.mean(0)
    torch.testing.assert_close(result.latents, latents - g / 2)
    torch.testing.assert_close(result.distance, (g / 2).norm().expand(2))
    assert result.reasons == ("converged",) * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_paper_stays_where_the_pull_is_weaker_than_the_norm(backend: str) -> None:
    """|g| <= 1: L0 is the minimum. Else each step goes |g| - 1 times the step size along -g."""
    undesired = draw(1, 1, 9)
    undesired = undesired / undesired.norm()
    latents = draw(0, 2, 9)
    weak = nudge(latents, undesired=undesired, beta=0.99, backend=backend)
    assert weak.reasons == ("converged",) * 2 and weak.steps.tolist() == [0, 0]
    assert torch.equal(weak.latents, latents)
    strong = nudge(latents, undesired=undesired, beta=3.0, steps=4, step_size=0.25, backend=backend)
    assert strong.reasons == ("steps",) * 2
    torch.testing.assert_close(strong.latents, latents - 4 * 0.25 * 2.0 * undesired)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cosine_does_not_depend_on_the_scale_of_points_and_latents(backend: str) -> None:
    latents, undesired = draw(0, 2, 30), draw(1, 3, 30)
    kwargs: dict[str, Any] = {"objective": "cosine", "beta": 4.0}
    one = nudge(latents, undesired=undesired, backend=backend, **kwargs)
    two = nudge(8 * latents, undesired=100 * undesired, backend=backend, **kwargs)
    torch.testing.assert_close(8 * one.latents, two.latents, rtol=1e-4, atol=1e-4)
    assert bool((one.distance > 0.1).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_and_radius_may_differ_by_item(backend: str) -> None:
    latents, undesired = draw(0, 3, 9), draw(1, 3, 9)
    radius = torch.tensor([0.5, 1.5, 100.0], device=DEVICE)
    result = nudge(
        latents,
        undesired=undesired,
        beta=torch.tensor([9.0, 9.0, 0.0], device=DEVICE),
        max_distance=radius,
        backend=backend,
    )
    assert result.reasons == ("distance", "distance", "converged")
    torch.testing.assert_close(result.distance[:2], radius[:2])
    assert torch.equal(result.latents[2], latents[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_comes_back_as_it_came(backend: str) -> None:
    latents = draw(0, 3, 9)
    latents[1, 4] = torch.nan
    points = draw(1, 3, 2, 9)
    points[2, 1, 3] = torch.inf
    result = nudge(latents, undesired=points, beta=9.0, backend=backend, return_trace=True)
    assert result.reasons == ("steps", "non-finite", "non-finite")
    assert not torch.equal(result.latents[0], latents[0])
    assert torch.equal(result.latents[1:].nan_to_num(7.0), latents[1:].nan_to_num(7.0))
    assert result.distance[1:].tolist() == [0.0, 0.0]
    assert result.trace is not None and bool(result.trace[1:].isnan().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_latents_and_wide_items(backend: str) -> None:
    """Items wider than a block of the kernel, made of every second number of a tensor."""
    latents, undesired = draw(0, 2, 10_000, 2)[..., 0], draw(1, 1, 10_000, scale=0.1)
    expected = oracle(latents, {"undesired": undesired, "steps": 3})
    result = nudge(latents, undesired=undesired, steps=3, backend=backend)
    torch.testing.assert_close(result.latents.double(), expected.latents, rtol=1e-5, atol=1e-5)
    assert torch.equal(result.steps, expected.steps)


@given(
    st.integers(0, 10_000),
    st.sampled_from(OBJECTIVES),
    st.floats(0.01, 5.0),
    st.floats(0.0, 20.0),
    st.integers(1, 8),
)
@settings(max_examples=40, deadline=None)
def test_the_radius_holds_and_small_steps_descend(
    seed: int, objective: str, radius: float, beta: float, steps: int
) -> None:
    latents, undesired = draw(seed, 2, 12), draw(seed + 1, 3, 12)
    result = nudge(
        latents,
        undesired=undesired,
        beta=beta,
        objective=objective,
        steps=steps,
        step_size=0.01,
        max_distance=radius,
        return_trace=True,
        backend="torch",
    )
    assert bool((result.distance <= radius * (1 + 1e-5)).all())
    assert result.trace is not None
    scale = result.trace.abs().amax() + 1
    assert bool((result.trace.diff(dim=1) <= 1e-5 * scale).all())


def test_hundreds_of_thousands_of_points_take_no_copy() -> None:
    points = torch.randn(1, 64).bfloat16().expand(400_000, 64)
    latents = draw(0, 1, 64).bfloat16().cpu()
    for objective in OBJECTIVES:
        many = nudge(latents, undesired=points, objective=objective, beta=3.0, backend="torch")
        one = nudge(latents, undesired=points[:1], objective=objective, beta=3.0, backend="torch")
        torch.testing.assert_close(many.distance, one.distance, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"latents": torch.zeros(3)}, ValueError, r"\(B, \.\.\.\), got \(3,\)"),
        ({"latents": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "int64"),
        ({"latents": torch.zeros(0, 3)}, ValueError, r"empty: \(0, 3\)"),
        ({"undesired": None}, ValueError, "nothing to steer by"),
        ({"undesired": torch.zeros(4, 5)}, ValueError, r"\(K, 3\) or \(2, K, 3\), got \(4, 5\)"),
        ({"undesired": torch.zeros(0, 3)}, ValueError, "holds no points"),
        ({"undesired": torch.zeros(4, 3).double()}, TypeError, "share dtype and device"),
        ({"undesired": [1.0]}, TypeError, "list"),
        ({"objective": "other"}, ValueError, "paper, squared, cosine, got 'other'"),
        ({"steps": 0}, ValueError, "positive integer, got 0"),
        ({"steps": True}, ValueError, "positive integer, got True"),
        ({"step_size": 0}, ValueError, "step_size must be positive"),
        ({"step_size": math.nan}, ValueError, "step_size must be positive"),
        ({"tolerance": -1.0}, ValueError, "tolerance must be positive"),
        ({"beta": math.inf}, ValueError, "beta must be finite, got inf"),
        ({"beta": "1"}, TypeError, "beta must be a number"),
        ({"beta": torch.ones(5)}, ValueError, r"each of the 2 items, got the shape \(5,\)"),
        ({"max_distance": 0.0}, ValueError, "max_distance must be positive"),
        ({"backend": "numpy"}, ValueError, "backend must be one of"),
    ],
    ids=str,
)
def test_bad_arguments_say_what_is_wrong(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"latents": torch.zeros(2, 3), "undesired": torch.ones(4, 3), **changes}
    with pytest.raises(error, match=message):
        nudge(**arguments)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("traced", [True, False])
def test_opcheck_passes(backend: str, traced: bool) -> None:
    latents, points, ones = draw(0, 2, 9), draw(1, 1, 3, 9), torch.ones(2, device=DEVICE)
    arguments = (latents, None, points, ones, 3 * ones, ones, "paper", 3, 0.1, 1e-5)
    opcheck(ops.nudge, (*arguments, traced, backend))


def test_compiles_to_one_graph_without_a_new_one_for_new_weights() -> None:
    latents, points = draw(0, 2, 9), draw(1, 3, 9)
    counter = CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(x: Tensor, beta: Tensor) -> Tensor:
        return nudge(x, undesired=points, beta=beta).latents * 2

    for beta in (3.0, 5.0):
        expected = nudge(latents, undesired=points, beta=beta).latents * 2
        torch.testing.assert_close(step(latents, torch.tensor(beta, device=DEVICE)), expected)
    assert counter.frame_count == 1


def test_the_kernel_compiles_for_every_target() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "helpers" / "nudge_compile.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 9


def test_it_is_public() -> None:
    assert nf.nudge is nudge
