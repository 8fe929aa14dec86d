"""The hooks that guide a denoiser: one on the model, one shared by its attention modules.

The model's pre-hook reads the timestep once per forward and decides whether it is guided; the
attention hook hands the image tokens to `Guidance`; the model's post-hook, which also runs when
the forward raised, forgets the forward. In compiled code the attention hook is one opaque operator.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from ..config import NOISE, NegToMeConfig
from ..guidance import Guidance, PerThread, ThreadState, read_timestep
from .block_caches import CacheWatch, check_cache, skips_blocks
from .compiled import (
    ForwardOverride,
    forget_all,
    free_recompile_slots,
    is_compiled,
    nothing_compiles,
)
from .layouts import UNKNOWN, ImageTokens, Layout, is_attention
from .parallel import (
    TokenShards,
    refuse_tensor_parallel,
    refuse_unknown_sharding,
    token_shards,
)
from .references import References, refuse_stateful, select_items, with_latents

MOST_GROUPS = 3
"""Perturbed-attention guidance and InstructPix2Pix concatenate three parts, the others two."""

_NEVER = object()

# torch.compiler.disable would import the whole compiler here; this does so when it is called.
_outside_of_graphs: Callable[..., Any] = getattr(torch, "_disable_dynamo", torch.compiler.disable)
_open = threading.local()  # .hooks: those of the forward that this thread is in
_installed: weakref.WeakSet[ModelHooks] = weakref.WeakSet()
_installing = threading.RLock()


class PipelineSchedule:
    """What the pipeline knows about the run: the scheduler's timesteps and its guidance.

    A model is given a timestep that may have been rounded to bf16 and scaled; the scheduler has
    the exact one, and its place in the run.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self._source: torch.Tensor | None = None
        self._timesteps: list[float] = []
        self._nearest: dict[float, int] = {}  # timesteps that were asked for, and their index
        self._first = 0  # index of the earliest timestep that this run has asked for

    def belongs_to(self, pipe: Any) -> bool:
        return self._pipe() is pipe

    @property
    def running(self) -> bool:
        """Whether the pipeline is being called, and not another one that shares its model.

        A pipeline keeps what it knew of its last run, and does not tell when that was over.
        """
        return self._call() is not None

    def _call(self) -> FrameType | None:
        pipe = self._pipe()
        frame: FrameType | None = sys._getframe()
        while pipe is not None and frame is not None:
            # Looking at the locals of a frame keeps them alive, so no frames but the pipeline's.
            method: Any = getattr(type(pipe), frame.f_code.co_name, None)
            own = getattr(inspect.unwrap(method), "__code__", None) is frame.f_code
            if own and frame.f_locals.get("self") is pipe:
                return frame
            frame = frame.f_back
        return None

    @property
    def pipe(self) -> Any:
        return self._pipe()

    def generator(self) -> torch.Generator | None:
        """The random generator that the pipeline was called with, the first if there are many."""
        call = self._call()
        given = None if call is None else call.f_locals.get("generator")
        if isinstance(given, (list, tuple)) and given:
            given = given[0]
        return given if isinstance(given, torch.Generator) else None

    def scheduler_at(self, timestep: float, rounding: float) -> tuple[Any, torch.Tensor] | None:
        """A copy of the scheduler at a timestep, and that timestep (1,); the scheduler stays.

        None where it has no such timestep, and no count of its own steps in a run that goes on.
        """
        scheduler: Any = getattr(self._pipe(), "scheduler", None)
        if self.locate(timestep, rounding) is not None:
            index = min(
                range(len(self._timesteps)), key=lambda i: abs(self._timesteps[i] - timestep)
            )
        elif self.running and hasattr(scheduler, "step_index") and self._timesteps:
            # Schedulers that are inverted have a scale of their own.
            index = scheduler.step_index
            index = (scheduler.begin_index or 0) if index is None else index
        else:
            return None
        scheduler = copy.copy(scheduler)
        for name, value in (("_step_index", index), ("_begin_index", 0)):
            if hasattr(scheduler, name):
                setattr(scheduler, name, value)
        return scheduler, scheduler.timesteps[index : index + 1]

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineSchedule | None:
        """The clock of the copied pipeline, or none where the model was copied alone."""
        copied = memo.get(id(self._pipe()))
        return None if copied is None else PipelineSchedule(copied)

    @property
    def run(self) -> Any:
        """An object that is another one in every run: schedulers make new timesteps for each."""
        return getattr(getattr(self._pipe(), "scheduler", None), "timesteps", None)

    def guides_classifier_free(self) -> bool | None:
        """Whether the pipeline says that its batch has guidance parts; None if it does not say."""
        pipe, answers = self._pipe() if self.running else None, []
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
        timestep = getattr(pipe, "_current_timestep", None) if self.running else None
        if timestep is not None:
            return read_timestep(timestep)[0]
        step = getattr(getattr(pipe, "scheduler", None), "step_index", None)
        if step is None:
            step = getattr(getattr(pipe, "scheduler", None), "begin_index", None) or 0
        timesteps = self._read_timesteps()
        return timesteps[step] if step < len(timesteps) else None

    def counts_from_1000(self) -> bool:
        """Whether timesteps are on that scale: EDM schedulers have logarithms of the noise."""
        scheduler = getattr(self._pipe(), "scheduler", None)
        config = getattr(scheduler, "config", None)
        logarithmic = getattr(config, "timestep_type", None) == "continuous"
        if logarithmic or getattr(config, "sigma_data", None) is not None:
            return False
        return max(self._read_timesteps(), default=NOISE) <= NOISE + 1

    def locate(
        self, timestep: float, rounding: float, counted: bool = True
    ) -> tuple[float, int, int] | None:
        """The exact timestep, the index of its step and the number of steps of the run.

        None where the scheduler has no timestep within `rounding` of the one given. Without
        `counted` the number is that of the scheduler, which the run may not take all of.
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
        known = counted and self.running
        steps = getattr(self._pipe(), "_num_timesteps", None) if known else None
        remaining = len(timesteps) - begin
        return timesteps[index], max(index - begin, 0), min(steps or remaining, remaining)

    def step(self) -> tuple[int, int] | None:
        """Index and number of the steps by the scheduler's count, for one with a scale of its own.

        Inverted and consistency schedulers do not go from 1000 to 0.
        """
        scheduler: Any = getattr(self._pipe(), "scheduler", None)
        if not self.running or not hasattr(scheduler, "step_index"):
            return None
        first = getattr(scheduler, "begin_index", None) or 0
        index = first if scheduler.step_index is None else scheduler.step_index
        steps = getattr(self._pipe(), "_num_timesteps", None) or len(self._read_timesteps()) - first
        return index - first, steps

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
            self._source = source  # last: another thread may look at it meanwhile
        return self._timesteps


class RunTracker:
    """Tells the runs apart. The denoisers of a pipeline share one: they take part in one run."""

    number = PerThread(0)
    _schedule = PerThread[Any](None)
    _last_timestep = PerThread(-1.0)

    def __init__(self) -> None:
        self._here = ThreadState()

    def notice(self, timestep: float, schedule: Any, own: Callable[[], bool]) -> bool:
        """Whether a run begins with this forward.

        Args:
            timestep: of the forward, 1000 (noise) to 0.
            schedule: an object that is another one in every run; None where there is none.
            own: whether the schedule is that of this thread's run. While a pipeline that shares
                the model runs in another thread, it is not.
        """
        # Also where the run is known: a pipeline that shares this model has another scheduler.
        earlier, again = timestep > self._last_timestep, timestep == self._last_timestep
        if schedule is not None:
            again = schedule is not self._schedule and own()
        new = earlier or again
        self._schedule, self._last_timestep = schedule, timestep
        self.number += new
        return new


class ModelHooks:
    """The hooks on one denoiser, and what they know about the forward that is going on.

    Args:
        model: the denoiser.
        layout: where its image tokens are.
        config: the settings.
        clock: of the pipeline that was given; None for a bare model.
        peer: hooks of another denoiser of the pipeline, whose state is shared.
        references: those from outside of the batch.
    """

    # Of the run: looked at again when another one begins or the latents change their shape.
    _run = PerThread(0)
    _shape = PerThread[tuple[int, ...] | None](None)
    _groups = PerThread[int | None](None)
    _run_tokens = PerThread[ImageTokens | None](None)
    _captions = PerThread[Any](_NEVER)  # the argument that `_run_tokens` were found with
    # Of the forward that is going on, or of the grid module inside it.
    _tokens = PerThread[ImageTokens | None](None)
    _items = PerThread(0)
    _shards = PerThread[TokenShards | None](None)
    _exclusive = PerThread[frozenset[nn.Module]](frozenset())
    _watch = PerThread[CacheWatch | None](None)  # from the window until its trace is gone

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        config: NegToMeConfig,
        clock: PipelineSchedule | None,
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
        self._clock = clock
        self._compiled = False
        self._signature = inspect.signature(type(model).forward)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._positional = [p.name for p in self._signature.parameters.values() if p.kind in kinds]
        self._handles: list[RemovableHandle] = []
        self._set_blocks(self.choose_blocks(config))
        self._projections: dict[nn.Module, nn.Module] = {}
        self._projection_handles: dict[nn.Module, RemovableHandle] = {}
        self._own_forwards: dict[nn.Module, ForwardOverride] = {}
        self._runs: RunTracker = peer._runs if peer else RunTracker()
        self._here = ThreadState()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelHooks:
        memo[id(self)] = copied = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _Unguided, ()

    def install(self, compiled: bool = False) -> None:
        """Registers all hooks, or, where one cannot be registered, none.

        Args:
            compiled: the model is called through `torch.compile(model)`, which does not show in it.
        """
        model = self._model
        try:
            hook = model.register_forward_pre_hook(self._before_model, with_kwargs=True)
            self._keep(model, hook)
            self._keep(model, model.register_forward_hook(self._after_model, always_call=True))
            for module in model.modules():
                if type(module).__name__ in self.layout.grid_modules:
                    hook = module.register_forward_pre_hook(self._before_grid, with_kwargs=True)
                    self._keep(module, hook)
            for block, number in self._numbers.items():
                if self._projection_of(block) is None:
                    self._keep(block, block.register_forward_hook(BlockHook(self, number)))
            self._hook_projections()
        except BaseException:
            self.remove()
            raise
        with _installing:
            _installed.add(self)
        self._compiled = self._compiled or compiled
        unseen = not all(own.seen for own in self._own_forwards.values())
        if unseen and (self._compiled or is_compiled(model)):
            forget_all()
        free_recompile_slots(model)

    def remove(self) -> None:
        """Takes every hook away; what `guidance` has counted stays readable."""
        self._forget_forward(completed=False)
        if not self._handles:
            return
        for handle in (*self._handles, *self._projection_handles.values()):
            handle.remove()
        self._handles.clear()
        self._projection_handles.clear()
        self._projections.clear()
        for module in self._model.modules():
            self._discard_hooks(module)
        for own in self._own_forwards.values():
            own.remove()
        self._own_forwards.clear()
        with _installing:
            _installed.discard(self)
        free_recompile_slots(self._model)

    def choose_blocks(self, config: NegToMeConfig) -> dict[nn.Module, str]:
        """The blocks that these settings guide; raises as `apply_negtome`."""
        if config.steps is not None and self._clock is None:
            raise ValueError(
                f"steps={config.steps} needs the number of steps of a run, which a bare "
                f"{self.model_name} does not know; pass the pipeline, or use t_start and t_end"
            )
        return _guided_blocks(self._model, self.layout, config)

    def guide(self, blocks: dict[nn.Module, str], anew: bool) -> None:
        """Guides these blocks from now on; `anew`: also where they are the same."""
        if anew or blocks != self.blocks:
            self.remove()
            self._set_blocks(blocks)
            self.install()

    def _set_blocks(self, blocks: dict[nn.Module, str]) -> None:
        self.blocks = blocks
        with torch.inference_mode(False):
            # Whatever the caller's default device is: there the number would be waited for.
            self._numbers = {b: torch.tensor(i, device="cpu") for i, b in enumerate(blocks)}
        self._places = tuple(blocks.items())

    def _keep(self, module: nn.Module, handle: RemovableHandle) -> None:
        self._handles.append(handle)
        if module not in self._own_forwards:
            self._own_forwards[module] = ForwardOverride(module)

    def _discard_hooks(self, module: nn.Module) -> None:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, BlockHook) and hook.owner is self:
                    del hooks[key]

    @property
    def installed(self) -> bool:
        return bool(self._handles)

    def belongs_to(self, pipe: Any) -> bool:
        """Whether this pipeline was guided by these hooks."""
        return self._clock is not None and self._clock.belongs_to(pipe)

    @_outside_of_graphs
    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # An interrupt is no Exception, so torch skips the post-hook of the forward that it ended.
        self._forget_forward(completed=False)
        refuse_cache(model)
        arguments = self._by_name(model, args, kwargs)
        latents = self._latents(arguments)
        timestep, step, num_steps, rounding = self._time(arguments)
        self._notice_run(timestep, tuple(latents.shape))
        config = self.guidance.config
        if config.includes_step(timestep, step, num_steps, rounding) and self._groups is None:
            refuse_tensor_parallel(model)
            refuse_unknown_sharding(model)
            self._groups = config.groups or self._count_groups(model, latents)
            self._captions = _NEVER
        active = self.guidance.begin_step(
            timestep,
            step=step,
            num_steps=num_steps,
            groups=self._groups or 1,
            tolerance=rounding,
        )
        if active or self._watch is not None:
            self._watch_cache(model, active, timestep)
        if active:
            _refuse_recomputation(model)
            captions = arguments.get(self.layout.captions or "")
            if captions is not self._captions:
                self._captions = captions
                self._run_tokens = self.layout.image_tokens(model, arguments)
            self._tokens, self._items = self._run_tokens, latents.shape[0]
            self._shards = token_shards(model, self.layout, self._run_tokens)
            self._hook_projections()
            self._exclusive = self._find_exclusive()
            _open.hooks = self
            if self._references is not None:
                call = self._signature.bind_partial(model, *args, **kwargs)
                try:
                    self._record(self._references, model, call, latents, (timestep, rounding))
                except BaseException:
                    self._forget_forward(completed=False)
                    raise

    def _watch_cache(self, model: nn.Module, active: bool, timestep: float) -> None:
        """Has the blocks of this forward counted, where there is a cache that may skip some."""
        if not skips_blocks(model):
            self._watch = None
            return
        check_cache(model, self._references is not None, self._compiled)
        watch = self._watch or CacheWatch(model, _attention_modules(model, self.layout))
        self._watch = watch if watch.begin(active, timestep) else None

    def _record(
        self,
        references: References,
        model: nn.Module,
        call: inspect.BoundArguments,
        latents: torch.Tensor,
        time: tuple[float, float],
    ) -> None:
        """Runs the model on the references, in the conditioning of each group's first item.

        As many references at once as the run's own batch has room for. The model's `forward` is
        called, not the model: offloading replaces that, and no hook on the model sees it.
        """
        groups, batch = self.guidance.groups, latents.shape[0]
        if batch % groups:
            raise ValueError(
                f"the batch of {batch} items does not divide into {groups} equal groups"
            )
        refuse_stateful(call.arguments, self.model_name)
        clock, name = self._clock, self._latents_name(call.arguments)
        config = getattr(model, "config", None)
        channels = getattr(config, "out_channels", getattr(config, "out_visual_dim", None))
        given = references.latents(
            clock.pipe if clock else None,
            latents,
            self._tokens,
            channels,
            clock.scheduler_at(*time) if clock else None,
            clock.generator() if clock else None,
        )
        tokens, room = self._tokens, batch // groups
        frame_axis = self.layout.encode.frame_axis if self.layout.encode else 2
        frames = tokens.frames if tokens and self.layout.grid_modules else 1
        lists = isinstance(call.arguments[name], (list, tuple))
        devices = [latents.device] if latents.is_cuda else []
        for first in range(0, len(given), room):
            some = given[first : first + room]
            firsts = [group * room for group in range(groups) for _ in some]
            items = torch.tensor(firsts, device="cpu")
            self._items = len(items)
            selected = inspect.BoundArguments(call.signature, copy.copy(call.arguments))
            for key, value in list(call.arguments.items())[1:]:  # all but self
                chosen = select_items(value, batch, items, key, lists, frames)
                if key == name:
                    chosen = with_latents(chosen, some * groups, tokens, frame_axis)
                selected.arguments[key] = chosen
            if tokens is not None and tokens.starts is not None and len(tokens.starts) == batch:
                starts = tuple(tokens.starts[item] for item in items.tolist())
                self._tokens = replace(tokens, starts=starts)
            with (
                self.guidance.record(first, len(some)),
                torch.no_grad(),
                torch.random.fork_rng(devices),
            ):
                model.forward(*selected.args[1:], **selected.kwargs)
            self._tokens, self._items = tokens, batch

    @_outside_of_graphs
    def _after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._forget_forward(completed=output is not None)

    def _forget_forward(self, completed: bool) -> None:
        self._tokens = self._shards = _open.hooks = None
        self.guidance.end_step(completed=completed)
        if self._watch is not None:
            self._watch.end(completed)

    def _before_grid(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.guidance.active:
            return None
        name = next((k for k, v in kwargs.items() if isinstance(v, torch.Tensor)), "")
        images = args[0] if args else kwargs.get(name)
        if not isinstance(images, torch.Tensor) or images.ndim != 4:
            return None
        if torch.compiler.is_compiling() and not _differentiable(images):
            # Handed through, so that what is computed from it comes after.
            images = torch.ops.negtome_fast.enter_grid(images)
            return ((images, *args[1:]), kwargs) if args else (args, {**kwargs, name: images})
        self.enter_grid(images)
        return None

    @_outside_of_graphs
    def enter_grid(self, images: torch.Tensor) -> None:
        """The attention modules from here on see the pixels (B, C, H, W) as tokens."""
        height, width = images.shape[-2:]
        frames = self._run_tokens.frames if self._run_tokens else 1
        tokens = frames * height * width
        self._tokens = ImageTokens(tokens, tokens, (height, width), frames)

    def _after_attention(self, output: Any, number: torch.Tensor | int) -> Any:
        if not self.guidance.active:
            return None
        if isinstance(output, tuple):
            return (self._guide(output[0], number, True), *output[1:])
        return self._guide(output, number, False)

    def _before_projection(self, args: tuple[Any, ...], number: torch.Tensor | int) -> Any:
        if not self.guidance.active:
            return None
        return (self._guide(args[0], number, False), *args[1:])

    def _hook_projections(self) -> None:
        """Looked at in every guided forward: loading a LoRA replaces the projections."""
        for block, number in self._numbers.items():
            projection = self._projection_of(block)
            if projection is None or projection is self._projections.get(block):
                continue
            with _installing:
                if block in self._projections:
                    self._projection_handles[block].remove()
                    self._own_forwards.pop(self._projections[block]).remove()
                # What replaces a module may take its hooks over: quantization does so, and the
                # other thread that was here first.
                self._discard_hooks(projection)
                self._own_forwards[projection] = ForwardOverride(projection)
                hook = projection.register_forward_pre_hook(BlockHook(self, number))
                self._projection_handles[block] = hook
                self._projections[block] = projection

    def _find_exclusive(self) -> frozenset[nn.Module]:
        """The attention modules whose outputs nobody else can hold.

        A hook of somebody else may have kept what is now the output, even one further inside:
        a projection's output goes through a dropout of 0 as it is.
        """
        if not self.layout.fresh_outputs or _has_any_global_hook():
            return frozenset()
        return frozenset(
            block
            for block in self.blocks
            if all(
                isinstance(hook, BlockHook) and hook.owner is self
                for module in block.modules()
                for hooks in (module._forward_hooks, module._forward_pre_hooks)
                for hook in hooks.values()
            )
        )

    def _projection_of(self, block: nn.Module) -> nn.Module | None:
        """The output projection to hook; None where the attention output itself is the place."""
        if self.guidance.config.placement == "output" or getattr(block, "pre_only", False):
            return None
        projection = getattr(block, "to_out", None)
        if isinstance(projection, (nn.ModuleList, nn.Sequential)):
            return projection[0]
        return projection if isinstance(projection, nn.Module) else None

    def _guide(
        self, tokens: torch.Tensor, number: torch.Tensor | int, all_image: bool
    ) -> torch.Tensor:
        differentiable = _differentiable(tokens)
        if torch.compiler.is_compiling() and not differentiable:
            return torch.ops.negtome_fast.guide_block(tokens, number, all_image)
        if not torch.compiler.is_compiling() and nothing_compiles():
            return self._guide_block(tokens, number, all_image, not differentiable)
        return self.guide_block(tokens, number, all_image, inplace=not differentiable)

    @_outside_of_graphs
    def guide_block(
        self, tokens: torch.Tensor, number: torch.Tensor | int, all_image: bool, inplace: bool
    ) -> torch.Tensor:
        """`_guide_block`, which dynamo must not look into, whatever it does with the caller."""
        return self._guide_block(tokens, number, all_image, inplace)

    def _guide_block(
        self, tokens: torch.Tensor, number: torch.Tensor | int, all_image: bool, inplace: bool
    ) -> torch.Tensor:
        """The attention tokens (B, S, D) of a block with their image part guided.

        Args:
            number: of the block; a tensor on the CPU where compiled code names it.
            all_image: the tokens are all image, however many they are.
            inplace: the tokens may be written into where the block's outputs are exclusive.
        """
        module, block = self._places[int(number)]
        inplace = inplace and module in self._exclusive
        attended = self._attended_channels(module, tokens)
        if attended < tokens.shape[2]:
            part = tokens[..., :attended]
            guided = self._guide_block(part, number, all_image, inplace)
            return tokens if guided is part else torch.cat([guided, tokens[..., attended:]], dim=2)
        if self._holds_single_frames(tokens):
            videos = tokens.reshape(self._items, -1, tokens.shape[2])
            guided = self._guide_block(videos, number, all_image, inplace)
            return tokens if guided is videos else guided.reshape(tokens.shape)
        shards = self._shards_of(module)
        known = shards.image if shards else self._tokens
        grid = known.grid if known else None
        starts, count = self._image_places(tokens, known, block, all_image)
        if min(starts) != max(starts):
            return self._guide_scattered(tokens, block, starts, count)
        start, stop = starts[0], starts[0] + count
        whole = (start, stop) == (0, tokens.shape[1])
        if not (whole or inplace or _differentiable(tokens) or self.guidance.recording):
            # A copy of all tokens that is written into, rather than new images to join with text.
            tokens, inplace = tokens.clone(), True
        image = tokens if whole else tokens[:, start:stop]
        guided = self.guidance.apply(image, block=block, grid=grid, inplace=inplace, shards=shards)
        if guided is image:
            return tokens
        if whole:
            return guided
        return torch.cat([tokens[:, :start], guided, tokens[:, stop:]], dim=1)

    def _attended_channels(self, module: nn.Module, tokens: torch.Tensor) -> int:
        """How many channels are attention: FLUX.2 projects those of the feed-forward with them."""
        if self._projection_of(module) is None or not hasattr(module, "mlp_hidden_dim"):
            return tokens.shape[2]
        return min(int(getattr(module, "inner_dim", tokens.shape[2])), tokens.shape[2])

    def _holds_single_frames(self, tokens: torch.Tensor) -> bool:
        """Whether the items are the frames of the videos, in order: (B * F, H * W, D)."""
        image = self._tokens
        if image is None or image.frames == 1:
            return False
        one_frame = (self._items * image.frames, image.stream // image.frames)
        return tokens.ndim == 3 and tokens.shape[:2] == one_frame

    def _guide_scattered(
        self, tokens: torch.Tensor, block: str, starts: tuple[int, ...], count: int
    ) -> torch.Tensor:
        """As `guide_block`, where captions of several lengths come before the images."""
        grid = self._tokens.grid if self._tokens else None
        places = torch.tensor(starts, device=tokens.device)[:, None, None]
        places = places + torch.arange(count, device=tokens.device)[:, None]
        places = places.expand(-1, -1, tokens.shape[2])
        image = tokens.gather(1, places)
        guided = self.guidance.apply(image, block=block, grid=grid)
        return tokens if guided is image else tokens.scatter(1, places, guided)

    def _shards_of(self, module: nn.Module) -> TokenShards | None:
        """How the tokens are distributed that are guided at a block; None where they are not."""
        shards = self._shards
        if shards is None or (module in shards.gathered and self._projection_of(module) is None):
            return None
        return shards

    def _image_places(
        self, tokens: torch.Tensor, image: ImageTokens | None, block: str, all_image: bool
    ) -> tuple[tuple[int, ...], int]:
        """Where the image begins in each item (one number if it is the same), and its length."""
        length = tokens.shape[1] if tokens.ndim == 3 else -1
        if image is None and all_image and length >= 0:
            return (0,), length
        if image is not None and length == image.stream:
            return (image.first,), image.generated
        if image is not None and length > image.stream and not all_image:
            if image.starts is not None and len(image.starts) == tokens.shape[0]:
                return image.starts, image.generated
            if self.layout.joint:
                start = length - image.stream if self.layout.joint == "text_first" else 0
                return (start + image.first,), image.generated
        expected = "an unknown number of" if image is None else str(image.stream)
        raise ValueError(
            f"{self.model_name}: the attention output of {block} has the shape "
            f"{tuple(tokens.shape)} and the image {expected} tokens, so it is not known which "
            "tokens are the image; describe the model with negtome_fast.pipelines.register_layout"
        )

    def _by_name(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments of the model's forward."""
        if self.layout is not UNKNOWN:
            # Binding costs half of all that is done in a step outside of the window.
            return {**dict(zip(self._positional[1:], args, strict=False)), **kwargs}
        # In the order of the signature: the first tensor is taken for the latents.
        arguments = dict(self._signature.bind_partial(model, *args, **kwargs).arguments)
        arguments.pop(next(iter(arguments)))  # self
        return arguments

    def _latents_name(self, arguments: Mapping[str, Any]) -> str:
        if self.layout is not UNKNOWN:
            return self.layout.latents
        return next((k for k, v in arguments.items() if isinstance(v, torch.Tensor)), "")

    def _latents(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        latents = arguments.get(self._latents_name(arguments))
        if isinstance(latents, (list, tuple)) and latents:
            # Conditions come before what is generated (Z-Image Omni).
            latents = [item[-1] if isinstance(item, (list, tuple)) else item for item in latents]
            if any(item.shape != latents[0].shape for item in latents):
                raise ValueError(
                    f"{self.model_name}: the images of a batch have different sizes, so they have "
                    "no tokens to compare; generate one size at a time"
                )
            latents = torch.stack(latents)
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
            counted = self.guidance.config.steps is not None
            if self._clock and not counted and not self._clock.counts_from_1000():
                raise ValueError(
                    f"{self.model_name}: its scheduler does not count timesteps from 1000 to 0, "
                    "so t_start and t_end mean nothing; use a share of the steps, as in "
                    "steps=(0.0, 0.25)"
                )
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
        counted = self.guidance.config.steps is not None
        located = self._clock.locate(timestep, rounding, counted) if self._clock else None
        if located is not None:
            return (*located, 0.0)
        if counted:
            step = self._clock.step() if self._clock else None
            if step is not None:
                return timestep, *step, rounding
            raise ValueError(
                f"{self.model_name}: timestep {timestep:g} is none of the pipeline's scheduler, so "
                f"steps={self.guidance.config.steps} cannot be told; use t_start and t_end"
            )
        return timestep, None, None, rounding

    def _notice_run(self, timestep: float, shape: tuple[int, ...]) -> None:
        clock = self._clock
        schedule = clock.run if clock else None
        if self._runs.notice(timestep, schedule, lambda: clock is not None and clock.running):
            self.guidance.begin_run()
            if self._references is not None:
                self._references.begin_run()
        if (self._runs.number, shape) != (self._run, self._shape):
            self._run, self._shape, self._groups = self._runs.number, shape, None

    def _count_groups(self, model: nn.Module, latents: torch.Tensor) -> int:
        """Concatenated guidance repeats the latents; other images of a batch have other noise."""
        if self.layout.guidance == "sequential":
            return 1
        if self._clock is not None and self._clock.guides_classifier_free() is False:
            return 1
        # InstructPix2Pix and inpainting append channels that differ between the parts.
        config = getattr(model, "config", None)
        channels = getattr(config, "out_channels", None)
        if latents.ndim == 4 and isinstance(channels, int):
            latents = latents[:, :channels]
        elif latents.ndim == 5 and latents.shape[2] == getattr(config, "in_channels", None):
            latents = latents[:, :, :channels]
        for groups in range(2, MOST_GROUPS + 1):
            if latents.shape[0] % groups == 0:
                first, *others = latents.chunk(groups)
                if all(torch.equal(first, other) for other in others):
                    return groups
        return 1


class BlockHook:
    """The hook after an attention module, or before its output projection.

    One object per block, which for compiled code differs from the others by a tensor only: what
    looks at its hooks then serves all blocks.
    """

    def __init__(self, owner: ModelHooks, number: torch.Tensor) -> None:
        self.owner = owner
        self.number = number
        self.place = int(number)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Any) -> Any:
        number = self.number if torch.compiler.is_compiling() else self.place
        if output:
            return self.owner._after_attention(output[0], number)
        return self.owner._before_projection(args, number)


class _Unguided:
    """Stands for the hooks in a pickled model and does nothing: guidance is not saved with it."""

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    _before_model = _after_model = _before_grid = _nothing
    _after_attention = _before_projection = _nothing


# Compiled code cannot hold the state of a run, so it calls back. The state and the count of calls
# change as it runs, which a recorded CUDA graph would not repeat.
_OPAQUE_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []
torch.library.define(
    "negtome_fast::guide_block",
    "(Tensor tokens, Tensor number, bool all_image) -> Tensor",
    tags=_OPAQUE_TAGS,
)


@torch.library.impl("negtome_fast::guide_block", "CompositeExplicitAutograd")
def _guide_block(tokens: torch.Tensor, number: torch.Tensor, all_image: bool) -> torch.Tensor:
    hooks = _open.hooks
    guided = hooks.guide_block(tokens, number, all_image, inplace=False)
    return (tokens.clone() if guided is tokens else guided).contiguous()


@torch.library.register_fake("negtome_fast::guide_block")
def _fake_guide_block(tokens: torch.Tensor, number: torch.Tensor, all_image: bool) -> torch.Tensor:
    return tokens.new_empty(tokens.shape)


torch.library.define("negtome_fast::enter_grid", "(Tensor images) -> Tensor", tags=_OPAQUE_TAGS)


@torch.library.impl("negtome_fast::enter_grid", "CompositeExplicitAutograd")
def _enter_grid(images: torch.Tensor) -> torch.Tensor:
    _open.hooks.enter_grid(images)
    return images.clone()


@torch.library.register_fake("negtome_fast::enter_grid")
def _fake_enter_grid(images: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(images)


def _differentiable(tensor: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def hooks_by_pipeline(pipe: Any) -> list[ModelHooks]:
    """The hooks that were installed through this pipeline, whatever model it holds now."""
    with _installing:
        return [hooks for hooks in _installed if hooks.belongs_to(pipe)]


def refuse_cache(model: nn.Module) -> None:
    """Caches skip blocks or reuse their outputs from other steps, guided or not."""
    if getattr(model, "is_cache_enabled", False):
        raise ValueError(
            f"{type(model).__name__} has a cache enabled, which would mix guided and unguided "
            "steps; call its disable_cache() before guiding it"
        )


def _refuse_recomputation(model: nn.Module) -> None:
    """The backward pass would compute the blocks again when no step is open, without guidance."""
    if torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False):
        raise ValueError(
            f"{type(model).__name__} has gradient checkpointing enabled, which computes the blocks "
            "again after the guided step is over; call its disable_gradient_checkpointing(), or "
            "run it under torch.no_grad()"
        )


def find_hooks(model: nn.Module) -> ModelHooks | None:
    """The hooks that guide this model, if any; also right for a deep copy of a guided model."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, ModelHooks):
            return owner
    return None


def _attention_modules(model: nn.Module, layout: Layout) -> dict[nn.Module, str]:
    """Those whose image tokens can be guided, and their names."""
    return {
        module: name
        for name, module in model.named_modules()
        if is_attention(module, layout)
        and any(fnmatchcase(name, pattern) for pattern in layout.blocks)
        and not any(fnmatchcase(name, pattern) for pattern in layout.exclude)
    }


def _guided_blocks(model: nn.Module, layout: Layout, config: NegToMeConfig) -> dict[nn.Module, str]:
    attention = _attention_modules(model, layout)
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
