"""Schedule of whichever pipeline runs a model: the given one, or another that shares the model."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from torch import nn

from ..thread_state import PerThread, ThreadState
from .running_call import ModelCall
from .schedule import PipelineSchedule


class RunningSchedules:
    """Schedules of the pipelines that run a model.

    Args:
        model: the model.
        given: schedule of the pipeline that was guided; None for a bare model, whose schedule is
            never known.
    """

    _current = PerThread[PipelineSchedule | None](None)

    def __init__(self, model: nn.Module, given: PipelineSchedule | None) -> None:
        self.given = given
        self._model = model
        self._others: weakref.WeakKeyDictionary[Any, PipelineSchedule] = weakref.WeakKeyDictionary()
        self._thread_state = ThreadState()

    def __deepcopy__(self, memo: dict[int, Any]) -> RunningSchedules:
        model, given = copy.deepcopy(self._model, memo), copy.deepcopy(self.given, memo)
        return RunningSchedules(model, given)

    @property
    def current(self) -> PipelineSchedule | None:
        """The schedule of this thread's last forward; before it, that of the given pipeline."""
        return self._current or self.given

    def find(self) -> None:
        """Finds the pipeline that this thread is in; called before each forward of the model."""
        self._current = None
        if self.given is None or self.given.call.running:
            return
        pipe = ModelCall(self._model).scheduled_pipe()
        if pipe is None:
            return
        if pipe not in self._others:
            self._others[pipe] = PipelineSchedule(pipe)
        self._current = self._others[pipe]
