"""Compiled models under guidance: what is compiled, when, and that the result is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from helpers.pipelines_fixtures import flux_pipeline, generate
from negtome_fast.config import NegToMeConfig
from negtome_fast.pipelines import apply_negtome, negtome_guidance, remove_negtome

EARLY = NegToMeConfig(threshold=0.1, steps=(0.0, 0.6))
BLOCK_KINDS = 2
"""Double and single blocks; code that is compiled by regions is shared by all of a kind."""


def run(pipe: Any) -> Tensor:
    return generate(pipe, 2, size=(32, 32), steps=3)


def guided(**settings: Any) -> Tensor:
    """By a model that is not compiled."""
    pipe = flux_pipeline()
    with negtome_guidance(pipe, EARLY, **settings):
        return run(pipe)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compilations(call: Callable[[], object]) -> int:
    before = counters["stats"]["unique_graphs"]
    call()
    return counters["stats"]["unique_graphs"] - before


def compile_by_regions(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")


def compile_whole(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")


@pytest.mark.parametrize(
    ("compile_model", "variants"), [(compile_by_regions, BLOCK_KINDS), (compile_whole, 1)]
)
@pytest.mark.parametrize("placement", ["output", "pre_projection"])
def test_guidance_adds_one_variant_and_its_settings_none(
    compile_model: Callable[[Any], None], variants: int, placement: Any
) -> None:
    unguided, pipe = flux_pipeline(), flux_pipeline()
    compile_model(unguided)
    alone = compilations(lambda: run(unguided))
    torch.compiler.reset()
    compile_model(pipe)
    settings: dict[str, Any] = {"placement": placement}
    handle = apply_negtome(pipe, EARLY, **settings)
    results: list[Tensor] = []
    assert 0 < compilations(lambda: results.append(run(pipe))) <= alone + variants
    torch.testing.assert_close(results.pop(), guided(**settings))

    other = {"alpha": 0.4, "threshold": 0.5, "steps": (0.3, 1.0), **settings}
    handle.update(EARLY, **other)
    assert compilations(lambda: results.append(run(pipe))) == 0
    torch.testing.assert_close(results.pop(), guided(**other))
    handle.remove()
    with negtome_guidance(pipe, EARLY, **settings, alpha=-0.4) as handle:
        assert compilations(lambda: results.append(run(pipe))) == 0
    torch.testing.assert_close(results.pop(), guided(**settings, alpha=-0.4))

    # Back and forth: what was compiled without guidance is found again, and what was with it.
    assert compilations(lambda: results.append(run(pipe))) <= alone
    torch.testing.assert_close(results.pop(), run(flux_pipeline()))
    with negtome_guidance(pipe, EARLY, **settings) as handle:
        assert compilations(lambda: results.append(run(pipe))) == 0
    torch.testing.assert_close(results.pop(), guided(**settings))
    assert compilations(lambda: results.append(run(pipe))) == 0
    torch.testing.assert_close(results.pop(), run(flux_pipeline()))
    assert handle.summary().guided == 2


def arguments() -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(2.0), torch.arange(3.0), indexing="ij")
    return {
        "hidden_states": torch.randn(2, 6, 16, generator=random),
        "timestep": torch.ones(2),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=random),
        "pooled_projections": torch.zeros(2, 16),
        "img_ids": torch.stack([torch.zeros(6), rows.flatten(), columns.flatten()], dim=1),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", ["shell", "function"])
def test_compiled_code_that_is_kept_elsewhere_notices_the_guidance(kind: str) -> None:
    """`torch.compile(model)` beside the pipeline, or a compiled function that calls the model."""
    pipe = flux_pipeline()
    model = pipe.transformer
    function = model if kind == "shell" else (lambda **inputs: model(**inputs))
    compiled = torch.compile(function, backend="eager")
    plain = compiled(**arguments())[0]
    torch.testing.assert_close(plain, model(**arguments())[0])
    with negtome_guidance(pipe, threshold=0.1, t_end=0):
        pushed = model(**arguments())[0]
        assert not torch.equal(pushed[1], plain[1])
        torch.testing.assert_close(compiled(**arguments())[0], pushed)
    torch.testing.assert_close(compiled(**arguments())[0], plain)


@torch.no_grad()
def test_other_compiled_models_are_left_alone() -> None:
    pipe, calls = flux_pipeline(), torch.ones(3)
    other = torch.compile(lambda x: x.sin() + 1, backend="eager")
    other(calls)
    compile_by_regions(pipe)
    run(pipe)
    apply_negtome(pipe, EARLY)
    run(pipe)
    remove_negtome(pipe)
    assert compilations(lambda: other(calls)) == 0
