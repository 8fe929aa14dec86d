"""`WindowWatch`: tells of runs whose window no step reaches, as early as that is certain.

Image-to-image begins below the window of a run from pure noise, and a run of few steps may jump
over it. Nothing would be guided then, without a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .config import NOISE, NegToMeConfig
from .thread_state import PerThread, ThreadState

PlannedStep = tuple[float, int, int]
"""Timestep, index of the step and number of steps of the run, as `includes_step` takes them."""


@dataclass
class _Run:
    """Facts about a run, as far as they are known.

    Attributes:
        config: the settings of its latest forward.
        goes_on_below: the run before was guided and ended at this timestep, before its schedule
            did; a run that begins below it goes on with it.
        first, last: timesteps of its first and its latest forward.
        last_step: index of the step of its latest forward.
        falls: a forward had a lower timestep than the one before, so time has a direction.
        guided: a forward lay in the window.
        settled: nothing more is to be said about it.
        patient: nothing is said before it is over.
        missed: what is to be said then.
        ends_early: the schedule has further steps after its last.
    """

    config: NegToMeConfig
    goes_on_below: float = -math.inf
    first: float | None = None
    last: float | None = None
    last_step: int | None = None
    falls: bool = False
    guided: bool = False
    settled: bool = False
    patient: bool = False
    missed: str | None = None
    ends_early: bool = False

    def is_over(self, timestep: float | None, step: int | None) -> bool:
        """Returns True if a forward at this time belongs to another run.

        Samplers that go back to more noise within a run stay below its beginning.
        """
        if timestep is not None and self.first is not None and self.last is not None:
            return timestep >= self.first and timestep > self.last
        return step == 0 and bool(self.last_step)


class WindowWatch:
    """Follows the runs of each thread, forward by forward; its methods return what is to be said.

    Attributes:
        advice: what to do about a window that is not reached, for interfaces that have no
            `first_steps`. None advises fields of the configuration.
        first_timestep: timestep of the first forward of the last run.
    """

    _run = PerThread[_Run | None](None)
    _told_beginnings = PerThread(False)

    def __init__(self) -> None:
        self.advice: str | None = None
        self.first_timestep: float | None = None
        self._thread_state = ThreadState()

    def begin(self, config: NegToMeConfig) -> str | None:
        """Begins a run, and ends the one before. Without it, the timesteps tell runs apart."""
        self._told_beginnings = True
        return self._begin(config)

    def _begin(self, config: NegToMeConfig) -> str | None:
        message, before = self.end(), self._run
        self._run = _Run(config)
        if before is not None and before.guided and before.ends_early and before.last is not None:
            self._run.goes_on_below = before.last
        return message

    def plan(
        self, steps: Sequence[PlannedStep], *, ends_early: bool, settings_may_change: bool
    ) -> str | None:
        """Notes all steps of the run that has begun, in order; none if they are not known.

        Args:
            steps: the steps.
            ends_early: the schedule has further steps.
            settings_may_change: the caller's code runs between the steps, so nothing is certain
                before the run is over.
        """
        run = self._run
        if run is None:
            return None
        run.ends_early, run.patient = ends_early, settings_may_change
        if not steps:
            return None
        first, _, count = steps[0]
        reached = any(run.config.includes_step(*step) for step in steps)
        if reached or first < run.goes_on_below:
            run.settled = True
            return None
        run.missed = self._message(run.config, first, count)
        return None if settings_may_change else self.end()

    def notice(
        self,
        config: NegToMeConfig,
        timestep: float | None,
        step: int | None,
        num_steps: int | None,
        tolerance: float,
        active: bool,
    ) -> str | None:
        """Notes a forward: the arguments of `includes_step`, and whether it is guided."""
        message, run = None, self._run
        if run is None or (not self._told_beginnings and run.is_over(timestep, step)):
            message = self._begin(config)
            run = self._run
            assert run is not None
        begins = run.last is None and run.last_step is None
        if begins:
            run.first = self.first_timestep = timestep
        elif timestep is not None and run.last is not None and timestep < run.last:
            run.falls = True
        run.config, run.last, run.last_step = config, timestep, step
        if active:
            run.guided = run.settled = True
        if not run.settled and not run.patient:
            run.missed = self._is_missed(run, begins, num_steps, tolerance)
        return self.end() if run.missed and not run.patient else message

    def _is_missed(
        self, run: _Run, begins: bool, num_steps: int | None, tolerance: float
    ) -> str | None:
        config, step = run.config, run.last_step
        if config.steps is not None:
            # A run that begins with a later step goes on with an earlier one.
            run.settled = not begins or step != 0
            every = range(num_steps or 0)
            if run.settled or any(config.includes_step(run.last, i, num_steps) for i in every):
                return None
            return self._message(config, run.first, num_steps)
        if config.first_steps is not None or run.last is None or not run.falls:
            return None
        below = run.last < config.t_end - tolerance - 1
        return self._message(config, run.first, None) if below else None

    def end(self, *, certain: bool = True) -> str | None:
        """Ends the run.

        Args:
            certain: no forward of the run follows. Otherwise only a run of known steps is judged.
        """
        run = self._run
        if run is None or run.settled:
            return None
        message = run.missed
        by_count = run.config.steps is not None or run.config.first_steps is not None
        if message is None and certain and run.falls and not by_count:
            message = self._message(run.config, run.first, None)
        run.settled = message is not None
        return message

    def _message(self, config: NegToMeConfig, first: float | None, num_steps: int | None) -> str:
        run = "this run" if num_steps is None else f"this run of {num_steps} steps"
        began = "" if first is None else f", which begins at timestep {first:.4g}"
        advice = self.advice or _advice(config, first, num_steps)
        return f"no step of {run}{began}, lies in the window {config.window}; {advice}"


def _advice(config: NegToMeConfig, first: float | None, num_steps: int | None) -> str:
    """Returns a sentence with a window that the run would reach."""
    if config.steps is not None:
        count = num_steps or 1
        step = min(int(config.steps[0] * count), count - 1)
        start, end = math.floor(step / count * 100) / 100, math.ceil((step + 1) / count * 100) / 100
        return f"nothing is guided. Use first_steps=1, or steps=({start:g}, {end:g})"
    width = config.t_start - config.t_end
    if num_steps is None:
        begin = first or 0.0
        window = f"t_end={math.floor(max(begin - max(width, 1.0), 0.0))}"
        if begin > config.t_start:
            window = f"t_start={min(math.ceil(begin), 1000)}, {window}"
        return f"nothing is guided. Use a window that the run reaches, such as {window}"
    count = max(round(width / NOISE * num_steps), 1)
    share = math.ceil(max(width / NOISE, 1 / num_steps) * 100) / 100
    return f"nothing is guided. Use first_steps={count}, or steps=(0.0, {min(share, 1.0):g})"
