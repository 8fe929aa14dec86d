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
from ..window_watch import PlannedStep
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
        self._order = 1  # number of timesteps of one step
        self._from_1000 = True

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
    def _scheduler(self) -> Any:
        return getattr(self._pipe(), "scheduler", None)

    @property
    def scheduler_name(self) -> str:
        return type(self._scheduler).__name__

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
        self._read_timesteps()
        return self._from_1000

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
            the scheduler has no timestep within `rounding`. The timesteps of one step of a
            second-order scheduler share its index.
        """
        index = self._index(timestep, rounding)
        if index is None:
            return None
        begin, end = self._bounds(index, counted)
        order, timesteps = self._order, self._timesteps
        return timesteps[index], max(index - begin, 0) // order, -((begin - end) // order)

    def plan(self, timestep: float, rounding: float) -> tuple[list[PlannedStep], bool]:
        """Returns all steps of the run that begins with a timestep; none if it is not known.

        Also returns True if the scheduler has further steps.
        """
        index = self._index(timestep, rounding)
        if index is None:
            return [], False
        begin, end = self._bounds(index, counted=True)
        order, timesteps = self._order, self._timesteps
        number = -((begin - end) // order)
        steps = [(timesteps[i], max(i - begin, 0) // order, number) for i in range(index, end)]
        return steps, end < len(timesteps)

    def _index(self, timestep: float, rounding: float) -> int | None:
        """Returns the place of a timestep in the schedule; None if it has none within rounding."""
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
        # Second-order and rounded schedules have timesteps twice; the scheduler counts.
        counted = getattr(self._scheduler, "step_index", None)
        if isinstance(counted, int) and timesteps[counted : counted + 1] == [timesteps[index]]:
            return counted
        return index

    def _bounds(self, index: int, counted: bool) -> tuple[int, int]:
        """Returns the places of the run's first timestep and of the one after its last."""
        # Image-to-image starts later in the schedule; a base model with a refiner ends earlier.
        begin, places = getattr(self._scheduler, "begin_index", None), len(self._timesteps)
        if not isinstance(begin, int):
            self._first = begin = min(self._first, index)
        known = counted and self.call.running
        steps = getattr(self._pipe(), "_num_timesteps", None) if known else None
        return begin, begin + min(steps or places, places - begin)

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
            if getattr(getattr(self._scheduler, "config", None), "invert_sigmas", False):  # Mochi
                timesteps = [NOISE - timestep for timestep in timesteps]
            self._order = _timesteps_of_a_step(self._scheduler, len(timesteps))
            self._from_1000 = _counts_from_1000(self._scheduler, timesteps)
            self._timesteps, self._first, self._nearest = timesteps, len(timesteps), {}
            self._source = source  # last, because another thread may read it meanwhile
        return self._timesteps


def _counts_from_1000(scheduler: Any, timesteps: list[float]) -> bool:
    """Returns False if a schedule is known to have another scale than 1000 (noise) to 0."""
    config = getattr(scheduler, "config", None)
    continuous = getattr(config, "timestep_type", None) == "continuous"
    # Euler then lists logarithms of the noise, for models that predict velocities.
    logarithmic = continuous and getattr(config, "prediction_type", None) == "v_prediction"
    if logarithmic or getattr(config, "sigma_data", None) is not None:
        return False
    highest, lowest = max(timesteps, default=NOISE), min(timesteps, default=0.0)
    # Shares of the noise from 1 to 0 (Wuerstchen, IPNDM), angles, and scales of another training.
    return highest <= NOISE + 1 and lowest >= -1 and (highest > 1.6 or len(timesteps) < 2)


def _timesteps_of_a_step(scheduler: Any, timesteps: int) -> int:
    """Returns 2 for a schedule of so many timesteps that lists the midpoints of steps, else 1."""
    number = getattr(scheduler, "num_inference_steps", None)
    both = isinstance(number, int) and number > 1 and timesteps >= 2 * number - 1
    return 2 if both and getattr(scheduler, "order", 1) == 2 else 1


class RunTracker:
    """Tells runs apart by their timesteps. All denoisers of a pipeline share one tracker.

    Attributes:
        number: number of runs that this thread has begun.
        goes_on: the last of them has the schedule of the one before: its timesteps rise, as when
            an image is inverted.
    """

    number = PerThread(0)
    goes_on = PerThread(False)
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
        if new:
            known = schedule is not None and schedule is self._schedule
            self.goes_on = known and own()
        self._schedule, self._last_timestep = schedule, timestep
        self.number += new
        return new
