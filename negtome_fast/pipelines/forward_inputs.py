"""Inputs of a denoiser's forward: its latents, its timestep, the guidance groups of its batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import NegToMeConfig
from ..guidance_step import read_timestep
from .layouts import UNKNOWN, Layout
from .schedule import PipelineSchedule

MAX_GROUPS = 3
"""Perturbed-attention guidance and InstructPix2Pix concatenate three parts, the others two."""


class ForwardInputs:
    """Reads the arguments of a denoiser's forward.

    Args:
        model: the denoiser.
        layout: names and meaning of its arguments.
        schedule: schedule of its pipeline; None for a bare model.
    """

    def __init__(self, model: nn.Module, layout: Layout, schedule: PipelineSchedule | None) -> None:
        self._model_name = type(model).__name__
        self._layout = layout
        self._schedule = schedule
        self._signature = inspect.signature(type(model).forward)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._positional = [p.name for p in self._signature.parameters.values() if p.kind in kinds]

    def bind(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> inspect.BoundArguments:
        """Returns the arguments bound to the signature, the model as `self`."""
        return self._signature.bind_partial(model, *args, **kwargs)

    def by_name(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns the arguments of the forward by their names, without the model."""
        if self._layout is not UNKNOWN:
            # Binding would cost half of all that is done in a step outside of the window.
            return {**dict(zip(self._positional[1:], args, strict=False)), **kwargs}
        # In the order of the signature: the first tensor is taken for the latents.
        arguments = dict(self.bind(model, args, kwargs).arguments)
        arguments.pop(next(iter(arguments)))  # self
        return arguments

    def latents_name(self, arguments: Mapping[str, Any]) -> str:
        """Returns the name of the argument that holds the latents."""
        if self._layout is not UNKNOWN:
            return self._layout.latents
        return next((k for k, v in arguments.items() if isinstance(v, Tensor)), "")

    def latents(self, arguments: Mapping[str, Any]) -> Tensor:
        """Returns the latents of the batch, items first.

        Raises:
            ValueError: there are none, or they have several sizes.
        """
        latents = arguments.get(self.latents_name(arguments))
        if isinstance(latents, (list, tuple)) and latents:
            # Conditions come before what is generated (Z-Image Omni).
            latents = [item[-1] if isinstance(item, (list, tuple)) else item for item in latents]
            if any(item.shape != latents[0].shape for item in latents):
                raise ValueError(
                    f"{self._model_name}: the images of a batch have different sizes, so their "
                    "tokens cannot be compared; generate one size at a time"
                )
            latents = torch.stack(latents)
        if not isinstance(latents, Tensor):
            raise ValueError(
                f"{self._model_name}: its forward was given no tensor "
                f"{self._layout.latents or 'of latents'}, only {list(arguments)}; describe the "
                "model with negtome_fast.pipelines.register_layout"
            )
        return latents

    def time(
        self, arguments: Mapping[str, Any], config: NegToMeConfig
    ) -> tuple[float, int | None, int | None, float]:
        """Reads the time of a forward.

        Args:
            config: the settings, of which the kind of window counts.

        Returns:
            The scheduler's timestep, the index of the step and the number of steps of the run (None
            where not known), and the rounding error of the timestep.

        Raises:
            ValueError: the window cannot be compared with this time.
        """
        timestep, rounding = self._timestep(arguments)
        schedule, counted = self._schedule, config.counts_steps
        located = (
            schedule.locate(timestep, rounding, config.steps is not None) if schedule else None
        )
        if schedule is not None and not counted:
            asked = located is not None or self._layout.scheduler_timestep is None
            if asked and not schedule.counts_from_1000():
                raise ValueError(
                    f"{self._model_name}: its scheduler, {schedule.scheduler_name}, does not count "
                    "timesteps from 1000 to 0, so t_start and t_end mean nothing; use a share of "
                    "the steps, as in steps=(0.0, 0.25), or their number, as in first_steps=3"
                )
        if located is not None:
            return (*located, 0.0)
        if not counted:
            return timestep, None, None, rounding
        step = schedule.step() if schedule else None
        if step is None:
            raise ValueError(
                f"{self._model_name}: timestep {timestep:g} is none of the pipeline's scheduler, "
                f"so it is not known whether it lies in {config.window}; use t_start and t_end"
            )
        return timestep, *step, rounding

    def _timestep(self, arguments: Mapping[str, Any]) -> tuple[float, float]:
        """Returns the scheduler's timestep and its rounding error."""
        rounding = 0.0
        timestep: float | None = None
        if self._layout.scheduler_timestep is None:
            timestep = self._schedule.current() if self._schedule else None
        else:
            given = arguments.get(self._layout.timestep)
            if given is not None:
                value, rounding = read_timestep(given)
                timestep = self._layout.scheduler_timestep(value)
        if timestep is None:
            raise ValueError(
                f"{self._model_name}: the timestep of this forward is not known; describe the "
                "model with negtome_fast.pipelines.register_layout"
            )
        return timestep, rounding

    def count_groups(self, model: nn.Module, latents: Tensor) -> int:
        """Returns the number of guidance groups in the batch.

        Concatenated guidance repeats the latents; different images of a batch have different noise.
        """
        if self._layout.guidance == "sequential":
            return 1
        if self._schedule is not None and self._schedule.call.guides_classifier_free() is False:
            return 1
        # InstructPix2Pix and inpainting append channels that differ between the parts.
        config = getattr(model, "config", None)
        channels = getattr(config, "out_channels", None)
        if latents.ndim == 4 and isinstance(channels, int):
            latents = latents[:, :channels]
        elif latents.ndim == 5 and latents.shape[2] == getattr(config, "in_channels", None):
            latents = latents[:, :, :channels]
        for groups in range(2, MAX_GROUPS + 1):
            if latents.shape[0] % groups == 0:
                first, *others = latents.chunk(groups)
                if all(torch.equal(first, other) for other in others):
                    return groups
        return 1
