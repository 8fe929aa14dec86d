"""Pipelines with two denoisers have one handle and one state; both are guided, or neither is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from negtome_fast.functional import negtome
from negtome_fast.pipelines import ImageTokens, Layout, apply_negtome, layouts, remove_negtome
from negtome_fast.pipelines.hooks import find_hooks

HIDDEN = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.clone()


class TwoStage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.attn(hidden_states)


class Pipeline:
    """Pipeline with `transformer` for the first two timesteps, `transformer_2` for the others."""

    def __init__(self) -> None:
        self.transformer, self.transformer_2 = TwoStage(), TwoStage()
        self.scheduler = type("Scheduler", (), {})()

    def __call__(self) -> list[Tensor]:
        self.scheduler.timesteps = torch.tensor([1000.0, 900.0, 800.0, 700.0])
        models = [self.transformer] * 2 + [self.transformer_2] * 2
        steps = zip(models, self.scheduler.timesteps, strict=True)
        return [model(HIDDEN, t.expand(3)) for model, t in steps]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.setattr(layouts, "_LAYOUTS", dict(layouts._LAYOUTS))
    tokens = ImageTokens(6, 6, (2, 3))
    layout = Layout(guidance="sequential", image_tokens=lambda model, arguments: tokens)
    layouts.register_layout(TwoStage, layout)
    return Pipeline()


def hooks_on(pipe: Any) -> int:
    models = [model for model in (pipe.transformer, pipe.transformer_2) if model is not None]
    modules = [module for model in models for module in model.modules()]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def test_one_window_and_one_summary_span_both(pipe: Pipeline) -> None:
    handle = apply_negtome(pipe, threshold=0.1, t_start=950, t_end=750)
    outputs = pipe()
    for output, guided in zip(outputs, (False, True, True, False), strict=True):
        torch.testing.assert_close(output, negtome(HIDDEN, threshold=0.1) if guided else HIDDEN)
    summary = handle.summary()
    assert (summary.forwards, summary.guided) == (4, 2)
    assert [(row.block, row.calls) for row in summary.rows] == [("attn", 2)]
    assert handle.blocks == ("attn",)
    remove_negtome(pipe)
    assert hooks_on(pipe) == 0 and not handle.applied


def test_steps_are_counted_over_both(pipe: Pipeline) -> None:
    handle = apply_negtome(pipe, threshold=0.1, steps=(0.25, 0.75))
    outputs = pipe()
    assert [torch.equal(output, HIDDEN) for output in outputs] == [True, False, False, True]
    assert handle.summary().guided == 2


def test_the_second_denoiser_goes_on_with_the_dropout_of_the_first(pipe: Pipeline) -> None:
    """A new run starts the dropout anew; the change of the denoiser does not."""
    apply_negtome(pipe, threshold=-1, t_end=0, dropout=0.5)
    outputs = pipe()
    assert not torch.equal(outputs[1], outputs[2])
    assert all(torch.equal(a, b) for a, b in zip(outputs, pipe(), strict=True))


def test_where_the_second_cannot_be_guided_neither_is(pipe: Pipeline) -> None:
    pipe.transformer_2.attn = nn.Identity()
    with pytest.raises(ValueError, match="no attention module"):
        apply_negtome(pipe)
    assert hooks_on(pipe) == 0


def test_where_hooks_cannot_be_put_on_the_second_the_first_loses_its_own(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(pipe.transformer_2.attn, "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no hooks here"):
        apply_negtome(pipe)
    assert hooks_on(pipe) == 0


def test_a_second_that_is_guided_by_itself_is_an_error_that_says_so(pipe: Pipeline) -> None:
    handle = apply_negtome(pipe.transformer_2)
    before = hooks_on(pipe)
    with pytest.raises(ValueError, match="already applied to this TwoStage"):
        apply_negtome(pipe)
    assert hooks_on(pipe) == before
    handle.remove()
    assert hooks_on(pipe) == 0


@pytest.mark.parametrize("missing", ["transformer", "transformer_2"])
def test_either_may_be_missing(pipe: Pipeline, missing: str) -> None:
    setattr(pipe, missing, None)
    handle = apply_negtome(pipe)
    assert handle.applied and hooks_on(pipe) > 0
    handle.remove()
    assert hooks_on(pipe) == 0


def test_a_deep_copy_shares_a_state_of_its_own(pipe: Pipeline) -> None:
    handle = apply_negtome(pipe, threshold=0.1, t_end=0)
    expected = pipe()
    copied = copy.deepcopy(pipe)
    assert all(torch.equal(a, b) for a, b in zip(copied(), expected, strict=True))
    first, second = (find_hooks(model) for model in (copied.transformer, copied.transformer_2))
    assert first is not None and second is not None
    assert first.guidance is second.guidance is not handle.guidance
    # The copy counts the run before it was made, and its own run.
    assert (handle.summary().forwards, first.guidance.summary().forwards) == (4, 8)
    remove_negtome(copied)
    assert hooks_on(copied) == 0 and handle.applied
    assert all(torch.equal(output, HIDDEN) for output in copied())


def test_a_time_for_each_token_is_read_by_its_maximum(pipe: Pipeline) -> None:
    """The first frame of image-to-video is given and has time 0."""
    handle = apply_negtome(pipe.transformer, t_start=910, t_end=890)
    times = torch.tensor([0.0, 0.0, 900.0, 900.0, 900.0, 900.0])
    pipe.transformer(HIDDEN, times.expand(3, -1))
    assert handle.summary().guided == 1
    pipe.transformer(HIDDEN, (times / 2).expand(3, -1))
    assert handle.summary().guided == 1
    handle.remove()
