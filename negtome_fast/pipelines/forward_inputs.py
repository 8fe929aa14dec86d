"""Inputs of a denoiser's forward: its latents, its timestep, the groups of its batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import NegToMeConfig
from ..guidance_step import read_timestep
from .batch_groups import BatchGroups, divide_batch
from .layouts import UNKNOWN, Layout
from .running_call import ModelCall
from .running_schedule import RunningSchedules
from .schedule import PipelineSchedule


class ForwardInputs:
    """Reads the arguments of a denoiser's forward.

    Args:
        model: the denoiser.
        layout: names and meaning of its arguments.
        schedules: schedule of the pipeline that runs it.
    """

    def __init__(self, model: nn.Module, layout: Layout, schedules: RunningSchedules) -> None:
        self._model_name = type(model).__name__
        self._layout = layout
        self._schedules = schedules
        self._signature = inspect.signature(type(model).forward)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._positional = [p.name for p in self._signature.parameters.values() if p.kind in kinds]

    @property
    def _schedule(self) -> PipelineSchedule | None:
        return self._schedules.current

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

    def divide_batch(
        self,
        model: nn.Module,
        arguments: Mapping[str, Any],
        latents: Tensor,
        groups: int | None,
        references: bool,
    ) -> BatchGroups:
        """Finds the guidance parts and the groups of the batch.

        Args:
            arguments: the arguments of the forward, by name.
            latents: latents of the batch, items first.
            groups: the configuration's number of groups in each part; None finds it.
            references: items are guided by references from outside of the batch.

        Raises:
            ValueError: the batch and the pipeline's call disagree, or the groups do not divide it.
        """
        call = ModelCall(model, self._schedule.pipe if self._schedule else None)
        compared = [latents, *self._generated(model, arguments, latents, call)]
        sequential = self._layout.guidance == "sequential"
        return divide_batch(compared, call, groups, sequential, references)

    def _generated(
        self, model: nn.Module, arguments: Mapping[str, Any], latents: Tensor, call: ModelCall
    ) -> Iterator[Tensor]:
        """Yields the latents without the conditions, which may differ between guidance parts.

        InstructPix2Pix and inpainting append channels, edit pipelines tokens or columns.
        """
        config = getattr(model, "config", None)
        channels = getattr(config, "out_channels", None)
        if isinstance(channels, int) and latents.ndim == 4 and channels < latents.shape[1]:
            yield latents[:, :channels]
        elif isinstance(channels, int) and latents.ndim == 5:
            frames_first = latents.shape[2] == getattr(config, "in_channels", None)
            yield latents[:, :, :channels] if frames_first else latents[:, :channels]
        tokens = self._layout.image_tokens(model, arguments) if latents.ndim == 3 else None
        if tokens is not None and tokens.generated < tokens.num_tokens == latents.shape[1]:
            yield latents[:, tokens.offset : tokens.offset + tokens.generated]
        own = call.latents()
        if own is not None and own.ndim == latents.ndim and own.shape[1:] != latents.shape[1:]:
            yield latents[(slice(None), *(slice(0, size) for size in own.shape[1:]))]
