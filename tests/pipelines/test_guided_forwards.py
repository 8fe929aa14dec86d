"""The forwards that are guided are those that the settings name, by a count of the test's own.

The scheduler is asked for the time, not the model's arguments, and the attention outputs show which
forwards were guided, not the guidance's own statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
from helpers.families import FAMILIES
from helpers.families.core import denoiser
from negtome_fast.config import NegToMeConfig
from negtome_fast.pipelines import layouts, negtome_guidance

pytestmark = pytest.mark.filterwarnings("ignore:__array_")  # of numpy 2, about diffusers

EVERY_TOKEN = NegToMeConfig(threshold=-1.0, t_start=1000, t_end=0)
STEPS = 3


class Counter:
    """Counts the steps of a scheduler and compares attention outputs before and after guidance.

    Attributes:
        steps: index of the step of each forward of the model.
        changed: for each forward, whether an attention output changed.
    """

    def __init__(self, pipe: Any) -> None:
        self.steps: list[int] = []
        self.changed: list[bool] = []
        self._done, self._stepped = 0, False
        self._before: dict[nn.Module, Tensor] = {}
        self._model = denoiser(pipe)
        self._scheduler = pipe.scheduler

    @contextmanager
    def counting(self) -> Iterator[None]:
        cls = type(self._scheduler)
        step = cls.step

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._stepped = True
            return step(*args, **kwargs)

        # On the class, because some pipelines copy their scheduler for each frame.
        cls.step = counted
        try:
            with self._model.register_forward_pre_hook(self._begin):
                yield
        finally:
            cls.step = step

    def _begin(self, *_: Any) -> None:
        self._done, self._stepped = self._done + self._stepped, False
        self.steps.append(self._done)
        self.changed.append(False)

    @contextmanager
    def on(self, names: list[str], guidance: bool) -> Iterator[None]:
        """Hooks these modules: before the guidance does, or after it."""
        hook = self._compare if guidance else self._keep
        hooks = [self._model.get_submodule(name).register_forward_hook(hook) for name in names]
        try:
            yield
        finally:
            for one in hooks:
                one.remove()

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._before[module] = torch.cat([part.flatten() for part in _tensors(output)]).clone()

    def _compare(self, module: nn.Module, args: Any, output: Any) -> None:
        after = torch.cat([part.flatten() for part in _tensors(output)])
        self.changed[-1] |= not torch.equal(after, self._before.pop(module))


def _tensors(output: Any) -> list[Tensor]:
    parts = output if isinstance(output, tuple) else (output,)
    return [part for part in parts if isinstance(part, Tensor)]


def count(name: str, pipe: Any, **window: Any) -> tuple[list[int], list[bool]]:
    """Return the step of each forward, and whether it was guided."""
    family, counter = FAMILIES[name], Counter(pipe)
    with negtome_guidance(pipe, EVERY_TOKEN) as handle:
        blocks = list(handle.blocks)
    with (
        counter.on(blocks, guidance=False),
        negtome_guidance(pipe, EVERY_TOKEN, **window),
        counter.on(blocks, guidance=True),
        counter.counting(),
        torch.no_grad(),
    ):
        family.generate(pipe, 2, steps=STEPS, cfg=family.cfg)
    return counter.steps, counter.changed


def check(name: str) -> None:
    pipe = FAMILIES[name].build()
    steps, changed = count(name, pipe, first_steps=2)
    assert changed == [step < 2 for step in steps]
    number = max(steps) + 1
    steps, changed = count(name, pipe, steps=(0.4 / number, 1.4 / number))
    assert changed == [step == 1 for step in steps]
    # The schedule of an equal run: its second timestep, and what lies half way to the next ones.
    times = [FAMILIES[name].timesteps(t) for t in pipe.scheduler.timesteps.tolist()[:number]]
    low, high = (times[1] + times[2]) / 2, (times[0] + times[1]) / 2
    assert high - low > 2
    steps, changed = count(name, pipe, t_start=high, t_end=low)
    assert changed == [low <= times[step] <= high for step in steps] and any(changed)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_forwards_that_the_settings_name_are_guided(name: str) -> None:
    check(name)


def test_a_layout_that_reads_another_time_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layouts._LAYOUTS["FluxTransformer2DModel"]
    wrong = replace(right, scheduler_timestep=lambda value: 1000 - 1000 * value)
    monkeypatch.setitem(layouts._LAYOUTS, "FluxTransformer2DModel", wrong)
    with pytest.raises(AssertionError):
        check("flux")
