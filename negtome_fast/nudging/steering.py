"""`Steering`: one attempt's changes to a pipeline: nudged latents, NegToMe, both, or none."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..config import NegToMeConfig
from ..pipelines import negtome_guidance
from ..pipelines.references import Reference
from .attempts import Attempt
from .latents import LatentPoints, layout_of_pipeline
from .objective import nudge
from .points import SteeringPoints
from .schedule import Method, NudgeSchedule
from .verdicts import Verdict

NUDGING = ("nudge", "both")
"""Methods that move latents."""


class Steering:
    """Steering of the images that one attempt generates again.

    Args:
        pipe: the pipeline.
        points: images that steer each image; None steers nothing.
        schedule: strength and window.
        method: one of `METHODS`.
        attempt: number of the attempt; the first retry is 1.
        negtome: settings of NegToMe; None is the preset of the model's family.
        size: (height, width) of the images.
    """

    def __init__(
        self,
        pipe: Any,
        points: Sequence[SteeringPoints] | None,
        schedule: NudgeSchedule,
        method: Method,
        attempt: int,
        negtome: NegToMeConfig | None,
        size: tuple[int, int],
    ) -> None:
        self._pipe, self._points, self._schedule = pipe, points, schedule
        self._method, self._attempt, self._negtome, self._size = method, attempt, negtome, size
        self._factor = schedule.factor(attempt)
        # The distances are read when the attempt is over, so that no step waits for the device.
        self._moves: list[tuple[list[int], Tensor]] = []

    def batches(self, images: int) -> Iterator[list[int]]:
        """Yield lists of places of images that can be generated together."""
        if self._points is None or self._method == "nudge":
            yield list(range(images))
            return
        # NegToMe has the same references for a whole batch.
        alike: dict[tuple[str, ...], list[int]] = {}
        for place, points in enumerate(self._points):
            alike.setdefault(points.undesired_names, []).append(place)
        yield from alike.values()

    @contextmanager
    def applied(self, places: list[int]) -> Iterator[Callable[..., dict[str, Any]] | None]:
        """Steer the pipeline for these images; yields the callback for the end of each step.

        The pipeline is afterwards as it was.
        """
        if self._points is None:
            yield None
            return
        points = [self._points[place] for place in places]
        callback = self._callback(places, points) if self._method in NUDGING else None
        if self._method == "nudge":
            yield callback
            return
        config = self._negtome or _preset(self._pipe)
        references = [
            Reference(image.permute(1, 2, 0).numpy(), alpha=config.alpha * self._factor)
            for image in points[0].undesired
        ]
        with negtome_guidance(self._pipe, config, reference=references):
            yield callback

    def record(self, place: int, verdicts: tuple[Verdict, ...]) -> Attempt:
        """Record of this attempt at one image, given its place."""
        if self._points is None:
            return Attempt(self._attempt, verdicts)
        points, nudged = self._points[place], self._method in NUDGING
        return Attempt(
            self._attempt,
            verdicts,
            points.undesired_names,
            points.desired_names if nudged else (),
            self._schedule.beta * self._factor if nudged else None,
            sum(float(d[places.index(place)]) for places, d in self._moves if place in places),
        )

    def _callback(
        self, places: list[int], points: Sequence[SteeringPoints]
    ) -> Callable[..., dict[str, Any]]:
        """Callback that nudges the latents of these images between two steps."""
        schedule = self._schedule
        away = self._latents_of([one.undesired for one in points])
        wanted = [one.desired for one in points if one.desired is not None]
        toward = self._latents_of(wanted) if wanted else None

        def move(pipe: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
            if not schedule.moves_after(step, len(pipe.scheduler.timesteps), self._attempt):
                return {}
            latents = tensors["latents"]
            result = nudge(
                latents,
                None if toward is None else toward.at_step(pipe.scheduler, latents, step + 1),
                away.at_step(pipe.scheduler, latents, step + 1),
                alpha=schedule.alpha * self._factor,
                beta=schedule.beta * self._factor,
                objective=schedule.objective,
                steps=schedule.steps,
                step_size=schedule.step_size,
                max_distance=schedule.max_distance
                * self._factor
                * latents.flatten(1).float().norm(dim=1).clamp_min(1e-6),
            )
            self._moves.append((places, result.distance))
            return {"latents": result.latents}

        return move

    def _latents_of(self, pictures: Sequence[Tensor]) -> LatentPoints:
        pixels = [own.float() / 255 for own in pictures]
        return LatentPoints(self._pipe, layout_of_pipeline(self._pipe), pixels, self._size)


def check_callback(pipe: Any) -> None:
    """Refuse a pipeline whose latents cannot be reached between the steps.

    Raises:
        ValueError: its call takes no `callback_on_step_end`, or hands no latents to it.
    """
    arguments = inspect.signature(type(pipe).__call__).parameters
    called = "callback_on_step_end" in arguments or any(
        argument.kind is argument.VAR_KEYWORD for argument in arguments.values()
    )
    if not called or "latents" not in getattr(pipe, "_callback_tensor_inputs", ("latents",)):
        raise ValueError(
            f"{type(pipe).__name__} hands no latents to callback_on_step_end, so they cannot be "
            "nudged; use method='negtome' or 'reseed'"
        )


def _preset(pipe: Any) -> NegToMeConfig:
    """The authors' settings for the pipeline's family, or the defaults of an unknown one."""
    layout = layout_of_pipeline(pipe)
    return NegToMeConfig.preset(layout.preset) if layout.preset else NegToMeConfig()
