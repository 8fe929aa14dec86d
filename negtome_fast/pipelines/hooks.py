"""The hooks that guide a denoiser: one on the model, one shared by its attention modules.

The model's pre-hook reads the timestep once per forward and decides whether it is guided; the
attention hook hands the image tokens to `Guidance`; the model's post-hook, which also runs when
the forward raised, forgets the forward.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config import NegToMeConfig
from ..guidance import Guidance, read_timestep
from .layouts import UNKNOWN, ImageTokens, Layout, is_attention

MOST_GROUPS = 3
"""Perturbed-attention guidance and InstructPix2Pix concatenate three parts, the others two."""


class PipelineClock:
    """What the pipeline knows about the run: the scheduler's timesteps and its guidance.

    A model is given a timestep that may have been rounded to bf16 and scaled; the scheduler has
    the exact one, and its place in the run.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self._source: torch.Tensor | None = None
        self._timesteps: list[float] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineClock | None:
        """The clock of the copied pipeline, or none where the model was copied alone."""
        copied = memo.get(id(self._pipe()))
        return None if copied is None else PipelineClock(copied)

    @property
    def run(self) -> Any:
        """An object that is another one in every run: schedulers make new timesteps for each."""
        return getattr(getattr(self._pipe(), "scheduler", None), "timesteps", None)

    def guides_classifier_free(self) -> bool | None:
        """Whether the pipeline says that its batch has guidance parts; None if it does not say."""
        pipe, answers = self._pipe(), []
        for name in ("do_classifier_free_guidance", "do_perturbed_attention_guidance"):
            try:
                answer = getattr(pipe, name, None)
            except (AttributeError, TypeError):  # the property needs a value that no call has set
                answer = None
            if isinstance(answer, bool):
                answers.append(answer)
        return any(answers) if answers else None

    def current(self) -> float | None:
        """The timestep that the pipeline or its scheduler says is being computed."""
        pipe = self._pipe()
        timestep = getattr(pipe, "_current_timestep", None)
        if timestep is not None:
            return read_timestep(timestep)[0]
        step = getattr(getattr(pipe, "scheduler", None), "step_index", None)
        if step is None:
            step = getattr(getattr(pipe, "scheduler", None), "begin_index", None) or 0
        timesteps = self._read_timesteps()
        return timesteps[step] if step < len(timesteps) else None

    def locate(self, timestep: float, rounding: float) -> tuple[float, int, int] | None:
        """The exact timestep, the index of its step and the number of steps of the run.

        None where the scheduler has no timestep within `rounding` of the one given.
        """
        timesteps = self._read_timesteps()
        if not timesteps:
            return None
        index = min(range(len(timesteps)), key=lambda i: abs(timesteps[i] - timestep))
        if abs(timesteps[index] - timestep) > rounding + 1e-3:
            return None
        steps = getattr(self._pipe(), "_num_timesteps", None) or len(timesteps)
        skipped = max(len(timesteps) - steps, 0)  # image-to-image starts later in the schedule
        return timesteps[index], max(index - skipped, 0), min(steps, len(timesteps))

    def _read_timesteps(self) -> list[float]:
        source = self.run
        if not isinstance(source, torch.Tensor):
            return []
        if source is not self._source:
            self._source, self._timesteps = source, source.tolist()
        return self._timesteps


class ModelHooks:
    """The hooks on one denoiser, and what they know about the forward that is going on."""

    def __init__(
        self, model: nn.Module, layout: Layout, config: NegToMeConfig, clock: PipelineClock | None
    ) -> None:
        self.layout = layout
        self.guidance = Guidance(config)
        self.model_name = type(model).__name__
        self.blocks = _guided_blocks(model, layout, config)
        self._clock = clock
        self._signature = inspect.signature(type(model).forward)
        self._handles: list[RemovableHandle] = []
        self._projection_handles: list[RemovableHandle] = []
        self._projections: dict[nn.Module, str] = {}
        # Of the run: looked at again when another one begins or the latents change their shape.
        self._run: Any = None
        self._last_timestep = -1.0
        self._shape: tuple[int, ...] | None = None
        self._groups: int | None = None
        self._run_tokens: ImageTokens | None = None
        # Of the forward that is going on, or of the grid module inside it.
        self._tokens: ImageTokens | None = None

    def install(self, model: nn.Module) -> None:
        """Registers all hooks, or, where one cannot be registered, none."""
        try:
            hook = model.register_forward_pre_hook(self._before_model, with_kwargs=True)
            self._handles.append(hook)
            self._handles.append(model.register_forward_hook(self._after_model, always_call=True))
            for module in model.modules():
                if type(module).__name__ in self.layout.grid_modules:
                    hook = module.register_forward_pre_hook(self._before_grid, with_kwargs=True)
                    self._handles.append(hook)
            for block in self.blocks:
                if self._projection_of(block) is None:
                    self._handles.append(block.register_forward_hook(self._after_attention))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Takes every hook away; what `guidance` has counted stays readable."""
        self._forget_forward(completed=False)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def installed(self) -> bool:
        return bool(self._handles)

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # An interrupt is no Exception, so torch skips the post-hook of the forward that it ended.
        self._forget_forward(completed=False)
        refuse_cache(model)
        arguments = dict(self._signature.bind_partial(model, *args, **kwargs).arguments)
        arguments.pop(next(iter(arguments)))  # self
        latents = self._latents(arguments)
        timestep, step, num_steps, rounding = self._time(arguments)
        self._notice_run(timestep, tuple(latents.shape))
        config = self.guidance.config
        if config.includes_step(timestep, step, num_steps, rounding) and self._groups is None:
            self._groups = config.groups or self._count_groups(model, latents)
            self._run_tokens = self.layout.image_tokens(model, arguments)
        active = self.guidance.begin_step(
            timestep,
            step=step,
            num_steps=num_steps,
            groups=self._groups or 1,
            tolerance=rounding,
        )
        if active:
            self._tokens = self._run_tokens
            self._hook_projections()

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._forget_forward(completed=output is not None)

    def _forget_forward(self, completed: bool) -> None:
        self._tokens = None
        for handle in self._projection_handles:
            handle.remove()
        self._projection_handles.clear()
        self._projections.clear()
        self.guidance.end_step(completed=completed)

    def _before_grid(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self.guidance.active:
            return
        images = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
        if images is not None and images.ndim == 4:
            height, width = images.shape[-2:]
            self._tokens = ImageTokens(height * width, height * width, (height, width))

    def _after_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.guidance.active:
            return None
        # A hook of somebody else may have kept the output; then it is not ours to write into.
        ours = len(module._forward_hooks) == 1
        block = self.blocks[module]
        if isinstance(output, tuple):
            return (self._guide(output[0], block, ours, all_image=True), *output[1:])
        return self._guide(output, block, ours)

    def _before_projection(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not self.guidance.active:
            return None
        ours = len(module._forward_pre_hooks) == 1
        return (self._guide(args[0], self._projections[module], ours), *args[1:])

    def _hook_projections(self) -> None:
        """Found anew in every forward: loading a LoRA replaces the projections."""
        for block, name in self.blocks.items():
            projection = self._projection_of(block)
            if projection is not None:
                self._projections[projection] = name
                hook = projection.register_forward_pre_hook(self._before_projection)
                self._projection_handles.append(hook)

    def _projection_of(self, block: nn.Module) -> nn.Module | None:
        """The output projection to hook; None where the attention output itself is the place."""
        if self.guidance.config.placement == "output" or getattr(block, "pre_only", False):
            return None
        projection = getattr(block, "to_out", None)
        if isinstance(projection, (nn.ModuleList, nn.Sequential)):
            return projection[0]
        return projection if isinstance(projection, nn.Module) else None

    def _guide(
        self, tokens: torch.Tensor, block: str, ours: bool, all_image: bool = False
    ) -> torch.Tensor:
        """The attention tokens (B, S, D) with their image part guided."""
        grid = self._tokens.grid if self._tokens else None
        start, stop = self._image_range(tokens, block, all_image)
        whole = (start, stop) == (0, tokens.shape[1])
        image = tokens if whole else tokens[:, start:stop]
        ours = ours and not (torch.is_grad_enabled() and tokens.requires_grad)
        guided = self.guidance.apply(image, block=block, grid=grid, inplace=ours)
        if guided is image:
            return tokens
        if whole:
            return guided
        return torch.cat([tokens[:, :start], guided, tokens[:, stop:]], dim=1)

    def _image_range(self, tokens: torch.Tensor, block: str, all_image: bool) -> tuple[int, int]:
        image, length = self._tokens, tokens.shape[1] if tokens.ndim == 3 else -1
        if image is None and all_image and length >= 0:
            return 0, length
        if image is not None and length == image.stream:
            return 0, image.generated
        if image is not None and length > image.stream and not all_image and self.layout.joint:
            start = length - image.stream if self.layout.joint == "text_first" else 0
            return start, start + image.generated
        expected = "an unknown number of" if image is None else str(image.stream)
        raise ValueError(
            f"{self.model_name}: the attention output of {block} has the shape "
            f"{tuple(tokens.shape)} and the image {expected} tokens, so it is not known which "
            "tokens are the image; describe the model with negtome_fast.pipelines.register_layout"
        )

    def _latents(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        if self.layout is UNKNOWN:
            candidates = (v for v in arguments.values() if isinstance(v, torch.Tensor))
            latents = next(candidates, None)
        else:
            latents = arguments.get(self.layout.latents)
        if not isinstance(latents, torch.Tensor):
            raise ValueError(
                f"{self.model_name}: its forward was given no tensor "
                f"{self.layout.latents or 'of latents'}, only {list(arguments)}; describe the "
                "model with negtome_fast.pipelines.register_layout"
            )
        return latents

    def _time(self, arguments: Mapping[str, Any]) -> tuple[float, int | None, int | None, float]:
        """Of this forward: scheduler timestep, index of the step, steps of the run, rounding."""
        rounding = 0.0
        timestep: float | None
        if self.layout.scheduler_timestep is None:
            timestep = self._clock.current() if self._clock else None
        else:
            given = arguments.get(self.layout.timestep)
            timestep = None
            if given is not None:
                value, rounding = read_timestep(given)
                timestep = self.layout.scheduler_timestep(value)
        if timestep is None:
            raise ValueError(
                f"{self.model_name}: the timestep of this forward is not known; describe the model "
                "with negtome_fast.pipelines.register_layout"
            )
        located = self._clock.locate(timestep, rounding) if self._clock else None
        if located is not None:
            return (*located, 0.0)
        if self.guidance.config.steps is not None:
            raise ValueError(
                f"{self.model_name}: timestep {timestep:g} is none of the pipeline's scheduler, so "
                f"steps={self.guidance.config.steps} cannot be told; use t_start and t_end"
            )
        return timestep, None, None, rounding

    def _notice_run(self, timestep: float, shape: tuple[int, ...]) -> None:
        run = self._clock.run if self._clock else None
        # Also where the run is known: a pipeline that shares this model has another scheduler.
        earlier = timestep > self._last_timestep
        new = earlier or (timestep == self._last_timestep if run is None else run is not self._run)
        self._run, self._last_timestep = run, timestep
        if new:
            self.guidance.begin_run()
        if new or shape != self._shape:
            self._shape, self._groups = shape, None

    def _count_groups(self, model: nn.Module, latents: torch.Tensor) -> int:
        """Concatenated guidance repeats the latents; other images of a batch have other noise."""
        if self.layout.guidance == "sequential":
            return 1
        if self._clock is not None and self._clock.guides_classifier_free() is False:
            return 1
        # InstructPix2Pix and inpainting append channels that differ between the parts.
        channels = getattr(getattr(model, "config", None), "out_channels", None)
        if latents.ndim == 4 and isinstance(channels, int):
            latents = latents[:, :channels]
        for groups in range(2, MOST_GROUPS + 1):
            if latents.shape[0] % groups == 0:
                first, *others = latents.chunk(groups)
                if all(torch.equal(first, other) for other in others):
                    return groups
        return 1


def refuse_cache(model: nn.Module) -> None:
    """Caches skip blocks or reuse their outputs from other steps, guided or not."""
    if getattr(model, "is_cache_enabled", False):
        raise ValueError(
            f"{type(model).__name__} has a cache enabled, which would mix guided and unguided "
            "steps; call its disable_cache() before guiding it"
        )


def find_hooks(model: nn.Module) -> ModelHooks | None:
    """The hooks that guide this model, if any; also right for a deep copy of a guided model."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, ModelHooks):
            return owner
    return None


def _guided_blocks(model: nn.Module, layout: Layout, config: NegToMeConfig) -> dict[nn.Module, str]:
    attention = {
        module: name
        for name, module in model.named_modules()
        if is_attention(module, layout)
        and any(fnmatchcase(name, pattern) for pattern in layout.blocks)
        and not any(fnmatchcase(name, pattern) for pattern in layout.exclude)
    }
    if not attention:
        raise ValueError(
            f"no attention module that can be guided was found in {type(model).__name__}; describe "
            "the model with negtome_fast.pipelines.register_layout"
        )
    guided = {module: name for module, name in attention.items() if config.includes_block(name)}
    if not guided:
        raise ValueError(
            f"blocks={config.blocks} with exclude_blocks={config.exclude_blocks} leave nothing to "
            f"guide; the blocks of {type(model).__name__} are {', '.join(attention.values())}"
        )
    return guided
