"""Equal images of a batch cannot be pushed apart, and the summary says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
import diffusers

from helpers.pipelines_fixtures import ALWAYS, built, flux_pipeline, generate
from negtome_fast.pipelines import Reference, negtome_guidance
from negtome_fast.pipelines.equal_items import equal_pairs

SIZE = (32, 48)


def latents_of(family: str, items: str, seed: int = 5) -> Tensor:
    """Return latents of a batch in which equal letters are equal images."""
    shape = (6, 16) if family == "flux" else (4, 4, 6)
    random = torch.Generator().manual_seed(seed)
    drawn = {letter: torch.randn(shape, generator=random) for letter in sorted(set(items))}
    return torch.stack([drawn[letter] for letter in items])


def notes(family: str, items: str, cfg: bool = False, **arguments: Any) -> tuple[str, ...]:
    pipe = built(family)
    with negtome_guidance(pipe, ALWAYS, groups=None) as handle:
        given = latents_of(family, items)
        generate(pipe, len(items), size=SIZE, cfg=cfg, latents=given, **arguments)
    return handle.summary().notes


@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("abcd", []),
        ("aaa", ["items 0, 1 and 2 of a group"]),
        ("abac", ["items 0 and 2 of a group"]),
        ("abba", ["items 0 and 3 of a group", "items 1 and 2 of a group"]),
    ],
)
def test_equal_seeds_are_noted(family: str, items: str, expected: list[str], cfg: bool) -> None:
    found = notes(family, items, cfg)
    assert [note.split(" are identical")[0] for note in found] == expected
    assert all("give each a seed of its own" in note for note in found)
    with negtome_guidance(built(family), ALWAYS) as handle:
        for _ in range(2):
            generate(built(family), 2, size=SIZE, cfg=cfg, equal_latents=True)
    assert len(handle.summary().notes) == 1, "once, not once a run"


def test_noise_of_the_sampler_separates_them(sdxl: Any) -> None:
    own = sdxl.scheduler
    sdxl.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(own.config)
    try:
        assert notes("sdxl", "aa", steps=4) == ()
        assert len(notes("sdxl", "aa", steps=1)) == 1
    finally:
        sdxl.scheduler = own


@pytest.mark.parametrize("first_steps", [1, 2])
def test_a_reference_that_is_the_run_itself(first_steps: int) -> None:
    pipe, latents = flux_pipeline(), latents_of("flux", "ab")
    given = [Reference(latents_of("flux", "c", seed=6)[:1]), Reference(latents[1:], noise=False)]
    with negtome_guidance(pipe, ALWAYS, reference=given, first_steps=first_steps) as handle:
        generate(pipe, 2, size=SIZE, latents=latents)
    found = [note.split(" of a group")[0] for note in handle.summary().notes]
    # The run has left it in the second step.
    assert found == ["reference 1 and item 1"] * (first_steps == 1)


def test_items_of_different_texts_are_different() -> None:
    latents, texts = torch.ones(4, 3), torch.ones(4, 5, 2)
    assert equal_pairs(latents, {"states": texts}, 2) == {(0, 1)}
    texts[3] = 2  # in the conditional half alone
    assert equal_pairs(latents, {"states": texts}, 2) == frozenset()
    assert equal_pairs(latents, {"added": {"texts": texts}}, 2) == frozenset()
    assert equal_pairs(latents, {"states": texts}, 1) == {(0, 1), (0, 2), (1, 2)}
    assert equal_pairs(latents, {}, 4) == frozenset()
