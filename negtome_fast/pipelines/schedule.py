"""Time of a pipeline's run: its timesteps, the index of a step, and where one run ends.

A model is given a timestep that may have been rounded to bf16 and scaled. The pipeline's scheduler
has the exact one, and its index in the run.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..config import NOISE
from ..guidance_step import read_timestep
from ..thread_state import PerThread, ThreadState
from .running_call import RunningCall


class PipelineSchedule:
    """Schedule of a pipeline's runs, read from the pipeline and its scheduler.

    It holds the pipeline weakly. A deep copy belongs to the copied pipeline.

    Attributes:
        call: the call of the pipeline that this thread is in.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self.call = RunningCall(pipe)
        self._source: torch.Tensor | None = None
        self._timesteps: list[float] = []
        self._nearest: dict[float, int] = {}  # timestep asked for -> index of the nearest
        self._first = 0  # index of the earliest timestep that this run has asked for

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineSchedule | None:
        """Returns the schedule of the copied pipeline, or None if the model was copied alone."""
        copied = memo.get(id(self._pipe()))
        return None if copied is None else PipelineSchedule(copied)

    @property
    def pipe(self) -> Any:
        """The pipeline; None if it is gone."""
        return self._pipe()

    def belongs_to(self, pipe: Any) -> bool:
        return self._pipe() is pipe

    @property
    def run(self) -> Any:
        """An object whose identity changes with every run: schedulers make new timesteps for each.

        None if the scheduler has no timesteps.
        """
        return getattr(getattr(self._pipe(), "scheduler", None), "timesteps", None)

    def current(self) -> float | None:
        """Returns the timestep that the pipeline or its scheduler says is being computed."""
        pipe = self._pipe()
        timestep = getattr(pipe, "_current_timestep", None) if self.call.running else None
        if timestep is not None:
            return read_timestep(timestep)[0]
        step = getattr(getattr(pipe, "scheduler", None), "step_index", None)
        if step is None:
            step = getattr(getattr(pipe, "scheduler", None), "begin_index", None) or 0
        timesteps = self._read_timesteps()
        return timesteps[step] if step < len(timesteps) else None

    def counts_from_1000(self) -> bool:
        """Returns False if timesteps have another scale: EDM's are logarithms of the noise."""
        scheduler = getattr(self._pipe(), "scheduler", None)
        config = getattr(scheduler, "config", None)
        logarithmic = getattr(config, "timestep_type", None) == "continuous"
        if logarithmic or getattr(config, "sigma_data", None) is not None:
            return False
        return max(self._read_timesteps(), default=NOISE) <= NOISE + 1

    def locate(
        self, timestep: float, rounding: float, counted: bool = True
    ) -> tuple[float, int, int] | None:
        """Finds a timestep in the schedule.

        Args:
            timestep: in the scheduler's unit, 1000 (noise) to 0.
            rounding: its largest error, in timesteps.
            counted: ask the running pipeline for its number of steps. Otherwise the number is the
                scheduler's, and the run may stop before.

        Returns:
            The exact timestep, the index of its step and the number of steps of the run; None if
            the scheduler has no timestep within `rounding`.
        """
        timesteps = self._read_timesteps()
        if not timesteps:
            return None
        index, close = self._nearest.get(timestep, len(timesteps)), rounding + 1e-3
        # Another thread may have begun a run of other timesteps meanwhile.
        if index >= len(timesteps) or abs(timesteps[index] - timestep) > close:
            index = min(range(len(timesteps)), key=lambda i: abs(timesteps[i] - timestep))
            self._nearest[timestep] = index
        if abs(timesteps[index] - timestep) > close:
            return None
        # Image-to-image starts later in the schedule; a base model with a refiner ends earlier.
        begin = getattr(getattr(self._pipe(), "scheduler", None), "begin_index", None)
        if not isinstance(begin, int):
            self._first = begin = min(self._first, index)
        known = counted and self.call.running
        steps = getattr(self._pipe(), "_num_timesteps", None) if known else None
        remaining = len(timesteps) - begin
        return timesteps[index], max(index - begin, 0), min(steps or remaining, remaining)

    def step(self) -> tuple[int, int] | None:
        """Returns index and number of the steps by the scheduler's own count; None if it has none.

        Inverted and consistency schedulers do not go from 1000 to 0, but count their steps.
        """
        scheduler: Any = getattr(self._pipe(), "scheduler", None)
        if not self.call.running or not hasattr(scheduler, "step_index"):
            return None
        first = getattr(scheduler, "begin_index", None) or 0
        index = first if scheduler.step_index is None else scheduler.step_index
        steps = getattr(self._pipe(), "_num_timesteps", None) or len(self._read_timesteps()) - first
        return index - first, steps

    def scheduler_at(self, timestep: float, rounding: float) -> tuple[Any, torch.Tensor] | None:
        """Returns a copy of the scheduler set to a timestep, and that timestep (1,).

        None if the scheduler neither has the timestep nor counts the steps of the running pipeline.
        """
        scheduler: Any = getattr(self._pipe(), "scheduler", None)
        if self.locate(timestep, rounding) is not None:
            index = min(
                range(len(self._timesteps)), key=lambda i: abs(self._timesteps[i] - timestep)
            )
        elif self.call.running and hasattr(scheduler, "step_index") and self._timesteps:
            # Inverted schedulers have another scale of time.
            index = scheduler.step_index
            index = (scheduler.begin_index or 0) if index is None else index
        else:
            return None
        scheduler = copy.copy(scheduler)
        for name, value in (("_step_index", index), ("_begin_index", 0)):
            if hasattr(scheduler, name):
                setattr(scheduler, name, value)
        return scheduler, scheduler.timesteps[index : index + 1]

    def _read_timesteps(self) -> list[float]:
        source = self.run
        if not isinstance(source, torch.Tensor):
            return []
        if source is not self._source:
            timesteps = source.tolist()
            scheduler = getattr(self._pipe(), "scheduler", None)
            if getattr(getattr(scheduler, "config", None), "invert_sigmas", False):  # Mochi
                timesteps = [NOISE - timestep for timestep in timesteps]
            self._timesteps, self._first, self._nearest = timesteps, len(timesteps), {}
            self._source = source  # last, because another thread may read it meanwhile
        return self._timesteps


class RunTracker:
    """Tells runs apart by their timesteps. All denoisers of a pipeline share one tracker.

    Attributes:
        number: number of runs that this thread has begun.
    """

    number = PerThread(0)
    _schedule = PerThread[Any](None)
    _last_timestep = PerThread(-1.0)

    def __init__(self) -> None:
        self._thread_state = ThreadState()

    def begins_run(self, timestep: float, schedule: Any, own: Callable[[], bool]) -> bool:
        """Notes a forward and returns True if a run begins with it.

        Args:
            timestep: timestep of the forward, 1000 (noise) to 0.
            schedule: an object whose identity changes with every run, or None.
            own: returns True if the schedule belongs to this thread's run. It does not while a
                pipeline that shares the model runs in another thread.
        """
        # Tested also where the schedule is known: a pipeline that shares this model has another.
        earlier, again = timestep > self._last_timestep, timestep == self._last_timestep
        if schedule is not None:
            again = schedule is not self._schedule and own()
        new = earlier or again
        self._schedule, self._last_timestep = schedule, timestep
        self.number += new
        return new
