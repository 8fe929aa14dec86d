"""The hooks that guide a denoiser: one on the model, one shared by its attention modules.

The model's pre-hook reads the timestep once per forward and decides whether it is guided. The
attention hook (`attention_guide`) hands the image tokens to `Guidance`. The model's post-hook,
which also runs when the forward raised, closes the step. In compiled code the attention hook is one
opaque operator (`compiled`).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import NegToMeConfig
from ..guidance import Guidance
from ..thread_state import PerThread, ThreadState
from .attention_guide import AttentionGuide, is_differentiable
from .batch_groups import BatchGroups
from .block_caches import CacheGuard, check_cache, is_marked, refuse_cache, skipping
from .blocks import attention_modules, guided_blocks
from .compiled import (
    current,
    forget_all,
    free_recompile_slots,
    is_compiled,
    outside_of_graphs,
)
from .equal_items import Pair, equal_pairs, notes_on
from .forward_inputs import ForwardInputs
from .image_tokens import ImageTokens, check_own_latents
from .layouts import Layout
from .parallel_plan import refuse_tensor_parallel, refuse_unknown_sharding, token_shards
from .reference_forward import reference_call, refuse_stateful
from .references import References
from .registration import BlockHook, RegisteredHooks, Unsaved, installing
from .replaced_forwards import refuse_cache_hooks
from .running_call import ModelCall
from .running_schedule import RunningSchedules
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

    # State of the run. The tokens are found again when the latents change their shape.
    _run = PerThread(0)
    _shape = PerThread[tuple[int, ...] | None](None)
    _divisions = PerThread[dict[Any, BatchGroups] | None](None)  # by `groups` and latents' shape
    _run_tokens = PerThread[ImageTokens | None](None)
    _captions = PerThread[Any](_NEVER)  # the argument that `_run_tokens` were found with
    _skipping = PerThread[str | None](None)  # what may skip blocks in this run
    _equal = PerThread[frozenset[Pair] | None](None)  # items that were equal in all guided forwards
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
        self._schedules = RunningSchedules(model, schedule)
        self._inputs = ForwardInputs(model, layout, self._schedules)
        self._compiled = False
        self._attention = AttentionGuide(model, layout, self.guidance)
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
        if config.counts_steps and self._schedule is None:
            raise ValueError(
                f"{config.window} needs the steps of a run, which a bare "
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
        given = self._schedules.given
        return given is not None and given.belongs_to(pipe)

    @property
    def _schedule(self) -> PipelineSchedule | None:
        return self._schedules.current

    @outside_of_graphs
    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # An interrupt is not an `Exception`, so torch skips the post-hook of the forward that it
        # ended.
        self._close_forward(completed=False)
        refuse_cache(model)
        self._schedules.find()
        arguments = self._inputs.by_name(model, args, kwargs)
        latents = self._inputs.latents(arguments)
        config = self.guidance.config
        timestep, step, num_steps, rounding = self._inputs.time(arguments, config)
        self._notice_run(timestep, rounding, tuple(latents.shape))
        division = BatchGroups()
        if config.includes_step(timestep, step, num_steps, rounding):
            division = self._divide(model, arguments, latents)
        active = self.guidance.begin_step(
            timestep,
            step=step,
            num_steps=num_steps,
            parts=division.parts,
            groups=division.groups,
            order=division.order,
            tolerance=rounding,
        )
        if active or self._cache_guard is not None:
            self._guard_cache(model, active, timestep)
        if not active:
            return
        _refuse_recomputation(model)
        self._open_forward(model, arguments, latents)
        if self._references is None:
            self._notice_equal(latents, arguments, division)
        else:
            call = self._inputs.bind(model, args, kwargs)
            try:
                self._record(self._references, model, call, latents, division, (timestep, rounding))
            except BaseException:
                self._close_forward(completed=False)
                raise

    def _notice_run(self, timestep: float, rounding: float, shape: tuple[int, ...]) -> None:
        schedule = self._schedule
        run = schedule.run if schedule else None
        if self._runs.begins_run(
            timestep, run, lambda: schedule is not None and schedule.call.running
        ):
            self.guidance.begin_run(goes_on=self._runs.goes_on)
            if schedule is not None and not self._runs.goes_on:
                self._plan_run(schedule, timestep, rounding)
            if self._references is not None:
                self._references.begin_run()
        if self._runs.number != self._run:
            self._run, self._shape, self._divisions = self._runs.number, None, None
        if shape != self._shape:
            self._shape, self._captions, self._equal = shape, _NEVER, None

    def _divide(
        self, model: nn.Module, arguments: dict[str, Any], latents: torch.Tensor
    ) -> BatchGroups:
        """Returns the groups of a guided forward, found once per run and shape of the latents."""
        if self._divisions is None:
            self._divisions = {}
            refuse_cache_hooks(model)
            self._attention.begin_run()
            self._skipping = skipping(model, attention_modules(model, self.layout))
        shape = tuple(latents.shape)
        groups = self.guidance.config.groups
        key = (groups, shape)
        if key not in self._divisions:
            refuse_tensor_parallel(model)
            refuse_unknown_sharding(model)
            self._divisions[key] = self._inputs.divide_batch(
                model, arguments, latents, groups, references=self._references is not None
            )
        return self._divisions[key]

    def _plan_run(self, schedule: PipelineSchedule, timestep: float, rounding: float) -> None:
        """Tells the guidance what is known of the steps of the run that begins."""
        if not schedule.call.running:
            return  # another pipeline that shares the model may have another schedule
        steps, ends_early = schedule.plan(timestep, rounding)
        change = ModelCall(self._model, schedule.pipe).has_callback()
        watch = self.guidance.watch
        message = watch.plan(steps, ends_early=ends_early, settings_may_change=change)
        self.guidance.say(message)

    def end_run(self) -> None:
        """Says it if the pipeline's last run never reached the window."""
        if self._schedule is not None and not self._schedule.call.running:
            self.guidance.end_run(certain=False)

    def _guard_cache(self, model: nn.Module, active: bool, timestep: float) -> None:
        """Counts the blocks of this forward, if there is a cache that may skip some."""
        cache = self._skipping
        if cache is None and is_marked(model):  # a cache that came in the middle of a run
            cache = self._skipping = skipping(model, {})
        if cache is None:
            self._cache_guard = None
            return
        check_cache(model, cache, self._references is not None, self._compiled)
        guard = self._cache_guard
        if guard is None:
            guard = CacheGuard(model, attention_modules(model, self.layout), cache)
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
                own = ModelCall(model, self._schedule.pipe).latents()
                check_own_latents(model, self._run_tokens, latents, own)
        self._hook_projections()
        shards = token_shards(model, self.layout, self._run_tokens)
        self._attention.open(self._run_tokens, latents.shape[0], shards)
        current.forward = self._attention

    def _notice_equal(
        self,
        latents: torch.Tensor,
        arguments: Mapping[str, Any],
        division: BatchGroups,
        references: Sequence[Any] = (),
    ) -> None:
        """Notes the items that have been equal in all guided forwards of the run.

        They are read once a run, and again only while some are equal: noise may separate them.
        """
        before, guidance = self._equal, self.guidance
        if division.order is not None or (before is not None and not before):
            return
        now = equal_pairs(latents, arguments, guidance.groups, references)
        self._equal = now if before is None else now & before
        if self._equal != before:
            for note in notes_on(before or frozenset()):
                guidance.note(note, -1)
            for note in notes_on(self._equal):
                guidance.note(note)

    def _record(
        self,
        references: References,
        model: nn.Module,
        call: inspect.BoundArguments,
        latents: torch.Tensor,
        division: BatchGroups,
        time: tuple[float, float],
    ) -> None:
        """Runs the model on the references, in the conditioning of each group's first item.

        A forward holds as many references as the run's own batch has items. The call goes to the
        model's `forward`, not to the model: offloading replaces `forward`, and no hook on the model
        sees the call.

        Args:
            call: the arguments of the run's own forward.
            latents: latents of the run, items first.
            division: groups of the run's batch.
            time: timestep and its rounding error.
        """
        batch, conditioned = latents.shape[0], division.first_items(latents.shape[0])
        groups = len(conditioned)
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
            lambda: ModelCall(model, schedule.pipe if schedule else None).generator(),
        )
        self._notice_equal(latents, call.arguments, division, given)
        group_size = batch // groups
        devices = [latents.device] if latents.is_cuda else []
        for first in range(0, len(given), group_size):
            some = given[first : first + group_size]
            items = [item for item in conditioned for _ in some]
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
