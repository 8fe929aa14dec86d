"""The hooks that guide a denoiser: one on the model, one shared by its attention modules.

The model's pre-hook reads the timestep once per forward and decides whether it is guided. The
attention hook (`attention_guide`) hands the image tokens to `Guidance`. The model's post-hook,
which also runs when the forward raised, closes the step. In compiled code the attention hook is one
opaque operator (`compiled`).
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import NegToMeConfig
from ..guidance import Guidance
from ..thread_state import PerThread, ThreadState
from .attention_guide import AttentionGuide, is_differentiable
from .block_caches import CacheGuard, check_cache, refuse_cache, skips_blocks
from .blocks import attention_modules, guided_blocks
from .compiled import (
    current,
    forget_all,
    free_recompile_slots,
    is_compiled,
    outside_of_graphs,
)
from .forward_inputs import ForwardInputs
from .image_tokens import ImageTokens, check_own_latents
from .layouts import Layout
from .parallel_plan import refuse_tensor_parallel, refuse_unknown_sharding, token_shards
from .reference_forward import reference_call, refuse_stateful
from .references import References
from .registration import BlockHook, RegisteredHooks, Unsaved, installing
from .schedule import PipelineSchedule, RunTracker

_NEVER = object()

_installed: weakref.WeakSet[ModelHooks] = weakref.WeakSet()


class ModelHooks(Unsaved):
    """The hooks on one denoiser, and the state of its forward.

    Args:
        model: the denoiser.
        layout: where its image tokens are.
        config: the settings.
        schedule: schedule of the pipeline that was given; None for a bare model.
        peer: hooks of another denoiser of the pipeline, whose guidance and runs are shared.
        references: the references from outside of the batch, if any.
    """

    # State of the run, found again when a run begins or the latents change their shape.
    _run = PerThread(0)
    _shape = PerThread[tuple[int, ...] | None](None)
    _groups = PerThread[int | None](None)
    _run_tokens = PerThread[ImageTokens | None](None)
    _captions = PerThread[Any](_NEVER)  # the argument that `_run_tokens` were found with
    _cache_guard = PerThread[CacheGuard | None](None)  # until the first timestep after the window

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        config: NegToMeConfig,
        schedule: PipelineSchedule | None,
        peer: ModelHooks | None = None,
        references: References | None = None,
    ) -> None:
        self.layout = layout
        self.guidance: Guidance = (
            peer.guidance if peer else Guidance(config, references.settings if references else ())
        )
        self._references = references
        self.model_name = type(model).__name__
        self._model = model
        self._schedule = schedule
        self._inputs = ForwardInputs(model, layout, schedule)
        self._compiled = False
        self._attention = AttentionGuide(self.model_name, layout, self.guidance)
        self._registered = RegisteredHooks(self._attention)
        self._set_blocks(self.choose_blocks(config))
        self._runs: RunTracker = peer._runs if peer else RunTracker()
        self._thread_state = ThreadState()

    def install(self, compiled: bool = False) -> None:
        """Registers all hooks, or none if one cannot be registered.

        Args:
            compiled: the model is called through `torch.compile(model)`, which does not show in it.
        """
        model, registered = self._model, self._registered
        try:
            hook = model.register_forward_pre_hook(self._before_model, with_kwargs=True)
            registered.add(model, hook)
            hook = model.register_forward_hook(self._after_model, always_call=True)
            registered.add(model, hook)
            for module in model.modules():
                if type(module).__name__ in self.layout.grid_modules:
                    hook = module.register_forward_pre_hook(self._before_grid, with_kwargs=True)
                    registered.add(module, hook)
            for block, number in self._numbers.items():
                if self._attention.projection_of(block) is None:
                    hook = block.register_forward_hook(BlockHook(self._attention, number))
                    registered.add(block, hook)
            self._hook_projections()
        except BaseException:
            self.remove()
            raise
        with installing:
            _installed.add(self)
        self._compiled = self._compiled or compiled
        if registered.unseen and (self._compiled or is_compiled(model)):
            forget_all()
        free_recompile_slots(model)

    def remove(self) -> None:
        """Removes every hook; the counts of `guidance` stay readable."""
        self._close_forward(completed=False)
        if not self._registered:
            return
        self._registered.remove(self._model)
        with installing:
            _installed.discard(self)
        free_recompile_slots(self._model)

    def choose_blocks(self, config: NegToMeConfig) -> dict[nn.Module, str]:
        """Returns the blocks that these settings guide; raises as `apply_negtome`."""
        if config.steps is not None and self._schedule is None:
            raise ValueError(
                f"steps={config.steps} needs the number of steps of a run, which a bare "
                f"{self.model_name} does not know; pass the pipeline, or use t_start and t_end"
            )
        return guided_blocks(self._model, self.layout, config)

    def guide(self, blocks: dict[nn.Module, str], anew: bool) -> None:
        """Guides these blocks from now on.

        Args:
            anew: register the hooks again even if the blocks are the same.
        """
        if anew or blocks != self.blocks:
            self.remove()
            self._set_blocks(blocks)
            self.install()

    def _set_blocks(self, blocks: dict[nn.Module, str]) -> None:
        self.blocks = blocks
        with torch.inference_mode(False):
            # On the CPU, also if the default device is another: reading it must not wait.
            self._numbers = {b: torch.tensor(i, device="cpu") for i, b in enumerate(blocks)}
        self._attention.set_blocks(blocks)

    @property
    def installed(self) -> bool:
        return bool(self._registered)

    def belongs_to(self, pipe: Any) -> bool:
        """Returns True if this pipeline was guided by these hooks."""
        return self._schedule is not None and self._schedule.belongs_to(pipe)

    @outside_of_graphs
    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # An interrupt is not an `Exception`, so torch skips the post-hook of the forward that it
        # ended.
        self._close_forward(completed=False)
        refuse_cache(model)
        arguments = self._inputs.by_name(model, args, kwargs)
        latents = self._inputs.latents(arguments)
        config = self.guidance.config
        timestep, step, num_steps, rounding = self._inputs.time(arguments, config.steps)
        self._notice_run(timestep, tuple(latents.shape))
        if config.includes_step(timestep, step, num_steps, rounding) and self._groups is None:
            refuse_tensor_parallel(model)
            refuse_unknown_sharding(model)
            self._groups = config.groups or self._inputs.count_groups(model, latents)
            self._captions = _NEVER
        active = self.guidance.begin_step(
            timestep,
            step=step,
            num_steps=num_steps,
            groups=self._groups or 1,
            tolerance=rounding,
        )
        if active or self._cache_guard is not None:
            self._guard_cache(model, active, timestep)
        if not active:
            return
        _refuse_recomputation(model)
        self._open_forward(model, arguments, latents)
        if self._references is not None:
            call = self._inputs.bind(model, args, kwargs)
            try:
                self._record(self._references, model, call, latents, (timestep, rounding))
            except BaseException:
                self._close_forward(completed=False)
                raise

    def _notice_run(self, timestep: float, shape: tuple[int, ...]) -> None:
        schedule = self._schedule
        run = schedule.run if schedule else None
        if self._runs.begins_run(
            timestep, run, lambda: schedule is not None and schedule.call.running
        ):
            self.guidance.begin_run()
            if self._references is not None:
                self._references.begin_run()
        if (self._runs.number, shape) != (self._run, self._shape):
            self._run, self._shape, self._groups = self._runs.number, shape, None

    def _guard_cache(self, model: nn.Module, active: bool, timestep: float) -> None:
        """Counts the blocks of this forward, if there is a cache that may skip some."""
        if not skips_blocks(model):
            self._cache_guard = None
            return
        check_cache(model, self._references is not None, self._compiled)
        guard = self._cache_guard or CacheGuard(model, attention_modules(model, self.layout))
        self._cache_guard = guard if guard.begin(active, timestep) else None

    def _open_forward(
        self, model: nn.Module, arguments: dict[str, Any], latents: torch.Tensor
    ) -> None:
        """Notes where the image tokens of this guided forward are."""
        captions = arguments.get(self.layout.captions or "")
        if captions is not self._captions:
            first, self._captions = self._captions is _NEVER, captions
            self._run_tokens = self.layout.image_tokens(model, arguments)
            if first and self._schedule is not None:
                own = self._schedule.call.latents()
                check_own_latents(model, self._run_tokens, latents, own)
        self._hook_projections()
        shards = token_shards(model, self.layout, self._run_tokens)
        self._attention.open(self._run_tokens, latents.shape[0], shards)
        current.forward = self._attention

    def _record(
        self,
        references: References,
        model: nn.Module,
        call: inspect.BoundArguments,
        latents: torch.Tensor,
        time: tuple[float, float],
    ) -> None:
        """Runs the model on the references, in the conditioning of each group's first item.

        A forward holds as many references as the run's own batch has items. The call goes to the
        model's `forward`, not to the model: offloading replaces `forward`, and no hook on the model
        sees the call.

        Args:
            call: the arguments of the run's own forward.
            latents: latents of the run, items first.
            time: timestep and its rounding error.
        """
        groups, batch = self.guidance.groups, latents.shape[0]
        if batch % groups:
            raise ValueError(
                f"the batch of {batch} items does not divide into {groups} equal groups"
            )
        refuse_stateful(call.arguments, self.model_name)
        name = self._inputs.latents_name(call.arguments)
        schedule, attention = self._schedule, self._attention
        tokens = attention.tokens
        given = references.latents(
            schedule.pipe if schedule else None,
            latents,
            tokens,
            _generated_channels(model),
            schedule.scheduler_at(*time) if schedule else None,
            schedule.call.generator() if schedule else None,
        )
        group_size = batch // groups
        devices = [latents.device] if latents.is_cuda else []
        for first in range(0, len(given), group_size):
            some = given[first : first + group_size]
            items = [group * group_size for group in range(groups) for _ in some]
            selected = reference_call(call, name, batch, items, some * groups, tokens, self.layout)
            attention.items = len(items)
            if tokens is not None and tokens.starts is not None and len(tokens.starts) == batch:
                starts = tuple(tokens.starts[item] for item in items)
                attention.tokens = replace(tokens, starts=starts)
            with (
                self.guidance.record(first, len(some)),
                torch.no_grad(),
                torch.random.fork_rng(devices),
            ):
                model.forward(*selected.args[1:], **selected.kwargs)
            attention.tokens, attention.items = tokens, batch

    @outside_of_graphs
    def _after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._close_forward(completed=output is not None)

    def _close_forward(self, completed: bool) -> None:
        current.forward = None
        self._attention.close()
        self.guidance.end_step(completed=completed)
        if self._cache_guard is not None:
            self._cache_guard.end(completed)

    def _before_grid(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.guidance.active:
            return None
        name = next((k for k, v in kwargs.items() if isinstance(v, torch.Tensor)), "")
        images = args[0] if args else kwargs.get(name)
        if not isinstance(images, torch.Tensor) or images.ndim != 4:
            return None
        if torch.compiler.is_compiling() and not is_differentiable(images):
            # Passed through the operator, so that the compiler keeps the order.
            images = torch.ops.negtome_fast.enter_grid(images)
            return ((images, *args[1:]), kwargs) if args else (args, {**kwargs, name: images})
        self._attention.enter_grid(images)
        return None

    def _hook_projections(self) -> None:
        for block, number in self._numbers.items():
            projection = self._attention.projection_of(block)
            if projection is not None:
                self._registered.hook_projection(block, projection, number)


def _generated_channels(model: nn.Module) -> int | None:
    """Returns the number of channels that the model generates; its input may have more."""
    config = getattr(model, "config", None)
    return getattr(config, "out_channels", getattr(config, "out_visual_dim", None))


def _refuse_recomputation(model: nn.Module) -> None:
    """Refuses checkpointing: the backward pass would compute the blocks again, unguided."""
    if torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False):
        raise ValueError(
            f"{type(model).__name__} has gradient checkpointing enabled, which computes the blocks "
            "again after the guided step is over; call its disable_gradient_checkpointing(), or "
            "run it under torch.no_grad()"
        )


def hooks_by_pipeline(pipe: Any) -> list[ModelHooks]:
    """Returns the hooks installed through this pipeline, even if it now holds another model."""
    with installing:
        return [hooks for hooks in _installed if hooks.belongs_to(pipe)]


def find_hooks(model: nn.Module) -> ModelHooks | None:
    """Returns the hooks that guide this model, if any. A deep copy of the model has its own."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, ModelHooks):
            return owner
    return None
