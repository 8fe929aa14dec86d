"""Verdicts of summaries, and warnings of plain loops that do not reach their window."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from negtome_fast.config import NegToMeConfig
from negtome_fast.guidance import Guidance, ReferenceSettings
from negtome_fast.statistics import GuidanceSummary


def tokens(images: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(images, 24, 16, generator=torch.Generator().manual_seed(seed))


def run(
    guidance: Guidance,
    timesteps: Sequence[float] = (1000.0, 500.0),
    x: Tensor | None = None,
    references: Tensor | None = None,
    **step: Any,
) -> tuple[GuidanceSummary, list[str]]:
    """Return the summary after these forwards, and the warnings."""
    x = tokens() if x is None else x
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, timestep in enumerate(timesteps):
            if guidance.begin_step(timestep, step=number, num_steps=len(timesteps), **step):
                if references is not None:
                    with guidance.record():
                        guidance.apply(references)
                guidance.apply(x)
            guidance.end_step()
    return guidance.summary(), [str(warning.message) for warning in caught]


def settings(**changes: Any) -> NegToMeConfig:
    return NegToMeConfig(**{"threshold": 0.2, **changes})


def test_a_guided_run() -> None:
    summary, told = run(Guidance(settings()))
    assert summary.verdict == "guided" and not summary.notes and not told
    assert str(summary).splitlines()[0] == summary.sentence
    assert summary.sentence.startswith("NegToMe guided 1 of 2 model forwards, 1 guidance group ")
    values = json.loads(json.dumps(summary.to_dict()))
    for name in ("verdict", "sentence", "notes", "window", "first_timestep", "measured"):
        assert values[name] == getattr(summary, name) or name == "notes"
    assert (summary.first_timestep, summary.window) == (1000, "t_start=1000 to t_end=900")


@pytest.mark.parametrize("counted", [True, False], ids=["batch", "reference"])
def test_alpha_0_moves_nothing_and_says_so(counted: bool) -> None:
    references = [] if counted else [ReferenceSettings(alpha=0.0), ReferenceSettings()]
    given = None if counted else tokens(2, seed=1)
    summary, _ = run(Guidance(settings(alpha=0.0), references), references=given)
    assert summary.verdict == "measured only" and "measured only" in str(summary)
    assert summary.total.pushed == 0 < summary.total.matched


@pytest.mark.parametrize("combine", ["nearest", "sum"])
@pytest.mark.parametrize("thresholds", [(None, None), (0.55, 0.45)], ids=["one", "two thresholds"])
def test_tokens_at_a_reference_of_alpha_0_are_not_counted_as_pushed(
    combine: Any, thresholds: tuple[float | None, ...]
) -> None:
    x, given = tokens(), tokens(2, seed=1)
    pairs = list(zip((0.9, 0.0), thresholds, strict=True))
    references = [ReferenceSettings(alpha, threshold) for alpha, threshold in pairs]
    config = settings(combine=combine, threshold=0.5)
    guidance = Guidance(config, references)
    summary, _ = run(guidance, (1000.0,), x, given)
    guidance.begin_step(1000.0)
    with guidance.record():
        guidance.apply(given)
    moved = (guidance.apply(x) != x).any(dim=2).float().mean().item()
    assert 0 < moved < 1 and summary.total.pushed == pytest.approx(moved)
    both = Guidance(config, [ReferenceSettings(0.9, threshold) for _, threshold in pairs])
    assert run(both, (1000.0,), x, given)[0].total.matched == summary.total.matched > moved


def test_alpha_0_in_the_middle_of_a_run_is_counted_honestly() -> None:
    guidance = Guidance(settings(t_end=0))
    full, _ = run(guidance, (1000.0,))
    guidance.configure(settings(t_end=0, alpha=0.0))
    half, _ = run(guidance, (900.0,))
    assert half.verdict == "guided" and (half.guided, half.measured) == (2, 1)
    assert half.total.pushed == pytest.approx(full.total.pushed / 2)
    assert half.total.matched == pytest.approx(full.total.matched)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"threshold": 1.0}, "no token was more similar"),
        ({"dropout": 1.0}, "spared every matched token"),
        ({"blocks": "elsewhere"}, "no token was compared"),
        ({"t_start": 700, "t_end": 600}, "0 of 2 model forwards lay in the window"),
    ],
)
def test_why_nothing_was_guided(changes: dict[str, Any], reason: str) -> None:
    summary, _ = run(Guidance(settings(**changes)))
    assert summary.verdict == "not guided"
    assert str(summary).startswith("NegToMe did not guide: ") and reason in summary.sentence
    assert Guidance(settings()).summary().verdict == "not guided"


@pytest.mark.parametrize("reference", ["first", "others"])
def test_a_batch_of_one_is_advised_what_helps(reference: Any) -> None:
    x = tokens(1)
    guidance = Guidance(settings(reference=reference))
    if reference == "first":
        _, (message,) = run(guidance, (1000.0,), x)
    else:
        with pytest.raises(ValueError) as caught:
            run(guidance, (1000.0,), x)
        message = str(caught.value)
    assert "reference='others'" not in message and "Reference(" in message
    assert "at least two" in message or "more images" in message
    assert run(Guidance(settings(), [ReferenceSettings()]), (1000.0,), x, tokens(1, seed=1))[
        0
    ].guided
    assert run(Guidance(settings(reference=reference)), (1000.0,), tokens(2))[0].guided


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reference", ["first", "others"])
def test_equal_tokens_are_noted(dtype: torch.dtype, reference: Any) -> None:
    x = (tokens(1) * 30).repeat(3, 1, 1).to(dtype)
    summary, _ = run(Guidance(settings(reference=reference)), (1000.0,), x)
    (note,) = summary.notes
    assert "identical" in note and "seed of its own" in note and note in str(summary)
    assert not run(Guidance(settings()), (1000.0,), tokens().to(dtype))[0].notes


@pytest.mark.parametrize(
    ("window", "timesteps", "missed"),
    [
        ({}, (600.0, 500.0, 400.0), True),
        ({}, (1000.0, 750.0), False),
        ({"t_start": 900, "t_end": 800}, (1000.0, 750.0, 500.0), True),
        ({"t_start": 500, "t_end": 100}, (1000.0, 750.0), None),  # may go on
        ({}, (500.0,), False),
        ({}, (0.0, 500.0, 950.0), False),  # rises
        ({"steps": (0.9, 0.95)}, (1000.0, 750.0, 500.0, 250.0), True),
        ({"steps": (0.7, 0.8)}, (1000.0, 750.0, 500.0, 250.0), False),
        ({"first_steps": 1}, (300.0, 200.0), False),
    ],
)
def test_a_plain_loop_is_told_as_soon_as_it_is_certain(
    window: dict[str, Any], timesteps: tuple[float, ...], missed: bool | None
) -> None:
    guidance = Guidance(settings(**window))
    summary, told = run(guidance, timesteps)
    assert len(told) == bool(missed)
    assert all(f"begins at timestep {timesteps[0]:g}" in message for message in told)
    assert summary.notes == tuple(told)
    _, again = run(guidance, timesteps)
    # Without `begin_run`, equal warnings are given once; a run is over when the next one begins.
    assert len(again) == (missed is None)
    if missed:
        guidance.begin_run()
        assert len(run(guidance, timesteps)[1]) == 1


def test_the_first_steps_of_a_loop() -> None:
    guidance = Guidance(settings(first_steps=2))
    guided = [guidance.begin_step(step=i) for i in (0, 0, 1, 2, 3)]
    assert guided == [True, True, True, False, False]
    with pytest.raises(ValueError, match=r"first_steps=2 needs .*begin_step\(step="):
        guidance.begin_step(900.0)


def test_the_number_of_first_steps_is_checked_and_stored() -> None:
    config = NegToMeConfig(first_steps=3)
    assert config.to_dict()["first_steps"] == 3
    assert NegToMeConfig.from_dict(config.to_dict()) == config
    assert "first_steps" not in NegToMeConfig().to_dict(), "identities of stored results stay"
    assert NegToMeConfig.from_dict(NegToMeConfig().to_dict()) == NegToMeConfig()
    with pytest.raises(ValueError, match="two ways to say"):
        NegToMeConfig(first_steps=3, steps=(0, 0.5))
    with pytest.raises(ValueError, match="first_steps must be at least 1, not 0"):
        NegToMeConfig(first_steps=0)
    with pytest.raises(TypeError, match="first_steps must be an integer"):
        NegToMeConfig(first_steps=2.5)  # type: ignore[arg-type]
