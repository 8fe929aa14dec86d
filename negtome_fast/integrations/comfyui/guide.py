"""`Guide`: one NegToMe node at work, around each run and each forward of a ComfyUI model.

It is attached to a clone of the model. Wrappers open and close the steps of a `Guidance`; a UNet's
attention-output patches or `places.hooked` give it the image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from negtome_fast.config import NOISE, NegToMeConfig, ReferenceSettings
from negtome_fast.guidance import Guidance
from negtome_fast.pipelines.reference_forward import select_items
from negtome_fast.thread_state import PerThread, ThreadState

from .places import (
    UNET,
    Attention,
    ForwardTokens,
    attentions_of,
    check_model,
    hooked,
    image_grid,
    unet_grid,
    watched,
)
from .references import ReferenceImages
from .refusals import APPLY_MODEL, OUTER_SAMPLE, refuse_inexact_nodes
from .run import Run
from .telling import (
    tell_of_blocks,
    tell_of_missing_forwards,
    tell_of_one_image,
    tell_of_window,
)
from .window import Window

KEY = "negtome_fast"
_NEVER = -1.0
"""A time that no window holds."""


class NodeGuidance(Guidance):
    """Keeps its warnings for `Guide`, which may have words of the nodes for them.

    Python shows a warning once, and a ComfyUI that goes on for days would hide later ones.
    """

    def __init__(self, config: NegToMeConfig, references: Sequence[ReferenceSettings]) -> None:
        self.warnings: list[str] = []
        super().__init__(config, references)

    def begin_run(self, *, goes_on: bool = False) -> None:
        """Restarts as `Guidance` does, and forgets the warnings."""
        self.warnings.clear()
        super().begin_run(goes_on=goes_on)

    def _warn(self, message: str, stacklevel: int = 3) -> None:
        if message not in self.warnings:
            self.warnings.append(message)


class Guide:
    """Guides every model that it is attached to; they share its settings and statistics.

    Args:
        title: its name in the summary.
        config: the settings; the window sets t_start and t_end.
        window: the guided steps.
        references: images that guide the batch; None to guide it by its own images.
        across_prompts: without references, push the images of all prompts as one group.

    Attributes:
        guidance: the settings, and the statistics of the last run.
        run: the last run, and what the user was told of it; None before.
    """

    _paused = PerThread(False)
    _forward = PerThread[ForwardTokens | None](None)

    def __init__(
        self,
        title: str,
        config: NegToMeConfig,
        window: Window,
        references: ReferenceImages | None = None,
        across_prompts: bool = False,
    ) -> None:
        self.title = title
        self.window = window
        self.references = references
        self.across_prompts = across_prompts
        self.guidance = NodeGuidance(config, references.settings if references else ())
        self.run: Run | None = None
        self._groups = 1
        self._idle = self._running = False
        self._highest = 1.0
        self._attentions: WeakKeyDictionary[nn.Module, list[Attention]] = WeakKeyDictionary()
        self._thread_state = ThreadState()

    def __deepcopy__(self, memo: dict[int, Any]) -> Guide:
        """Returns itself: when ComfyUI clones a model it copies its patches, not its wrappers."""
        return self

    def attach(self, model: Any) -> Any:
        """Returns a guided clone of a ComfyUI MODEL; the model itself stays as it is."""
        check_model(model.model)
        clone = model.clone()
        clone.add_wrapper_with_key(OUTER_SAMPLE, KEY, self.sample)
        clone.add_wrapper_with_key(APPLY_MODEL, KEY, self.forward)
        if type(model.model.diffusion_model).__name__ == UNET:
            clone.set_model_attn1_output_patch(self.after_attn1)
            clone.set_model_attn2_output_patch(self.after_attn2)
        return clone

    def sample(self, executor: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Wraps a run (OUTER_SAMPLE): sets the window's sigmas and the references' latents.

        Raises:
            ValueError: the run cannot be guided as the settings say.
        """
        guider = executor.class_obj
        refuse_inexact_nodes(guider)
        patcher = guider.model_patcher
        self.guidance.reset()
        self.guidance.begin_run()
        self._attentions.clear()
        run = self.run = Run.of(self.title, executor, noise, *args, **kwargs)
        model_sampling = patcher.get_model_object("model_sampling")
        highest, lowest = self._set_window(model_sampling)
        self._groups = self._prompt_groups(run)
        self._idle = self.references is None and run.items == self._groups
        if self._idle:
            tell_of_one_image(run, self.guidance.config)
        elif run.sigmas and (lowest > max(run.sigmas) or highest < min(run.sigmas)):
            tell_of_window(run, self.window, model_sampling)
        if self.references is not None:
            self.references.begin_run(patcher.model, noise, run.seed)
        self._running = True
        try:
            samples = executor(noise, *args, **kwargs)
        finally:
            self._running = False
        if not run.notes and not run.guided:
            tell_of_window(run, self.window, model_sampling)
        if run.guided and not self.guidance.summary().rows:
            tell_of_blocks(run, self.guidance.config)
        if not self._idle:
            tell_of_missing_forwards(run, self.window, model_sampling)
        run.tell_equal_images(samples)
        for warning in self.guidance.warnings if not run.notes else ():
            run.tell(warning)
        return samples

    def _set_window(self, model_sampling: Any) -> tuple[float, float]:
        """Sets the window of the configuration; returns its (highest, lowest) sigma."""
        self._highest = float(model_sampling.sigma_max)
        highest, lowest = self.window.sigmas(model_sampling)
        if lowest > self._highest:
            raise ValueError(
                f"the window ends at sigma {lowest:g}, above the highest of this model, "
                f"{self._highest:g}, so no step would be guided; give it a lower end"
            )
        settings = {"t_start": self._time(highest), "t_end": self._time(lowest)}
        self.guidance.configure(self.guidance.config.with_overrides(**settings))
        return highest, lowest

    def _prompt_groups(self, run: Run) -> int:
        """Returns the number of guidance groups of a run's images, from their prompts.

        References are in the conditioning of a group's first image; so where images of one prompt
        are not next to each other, each image is a group.
        """
        groups = run.prompt_groups
        if self.references is not None:
            return groups or run.items
        if self.across_prompts:
            return 1
        if groups is None or groups == run.items > 1:
            prompts = ", ".join(str(number + 1) for number in run.prompts)
            raise ValueError(
                f"the images of this batch have the prompts {prompts}, and images are pushed away "
                "from images of the same prompt. Give every prompt the same number of images, at "
                "least 2, one after the other; or set across_prompts, which pushes them all as one "
                "group"
            )
        return groups

    def forward(
        self,
        executor: Any,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: torch.Tensor | None = None,
        c_crossattn: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Wraps a forward (APPLY_MODEL) at a sigma t (B,): opens and closes a step of the guidance.

        ComfyUI's batch has one part (items, ...) for each entry of `cond_or_uncond`, as many as fit
        into memory. These are the guidance parts; images of several prompts are groups in each.

        Raises:
            ValueError: the batch is not that of the run's images, or another node skipped blocks.
        """
        options = transformer_options or {}
        conditions = (c_concat, c_crossattn, control)
        if self._paused:
            return executor(x, t, *conditions, options, **kwargs)
        if self.run is None or not self._running:
            raise ValueError(
                "this sampler runs the model without the wrappers of a run (OUTER_SAMPLE), so the "
                "window is not known; use one of ComfyUI's samplers, or a model without NegToMe"
            )
        run, sigma, parts = self.run, float(t.max()), len(options.get("cond_or_uncond") or [0])
        model = executor.class_obj.diffusion_model
        grid = None if type(model).__name__ == UNET else image_grid(model, x)[1:]
        active = self.guidance.begin_step(
            _NEVER if self._idle else self._time(sigma),
            parts=parts,
            groups=self._groups,
            grid=grid,
        )
        run.forwards.append(sigma)
        run.guided += active
        completed = False
        try:
            if active:
                _check_items(x.shape[0], parts, run.items)
            with self._blocks(model, x, active) as blocks:
                if active and self.references is not None:
                    self._record(executor, x, t, conditions, options, kwargs)
                blocks.items = x.shape[0]
                blocks.ran.clear()
                output = executor(x, t, *conditions, options, **kwargs)
            if not options.get("patches_replace", {}).get("dit"):  # these may leave blocks out
                self._check_blocks(run, len(blocks.ran), active, sigma)
            completed = True
            return output
        finally:
            self.guidance.end_step(completed=completed)

    def after_attn1(self, tokens: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """Guides a UNet's attn1_output_patch: tokens (B, N, D) of a block's self-attention."""
        return self._after(tokens, options, "attn1")

    def after_attn2(self, tokens: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """Guides a UNet's attn2_output_patch: tokens (B, N, D) of a block's cross-attention."""
        return self._after(tokens, options, "attn2")

    def _after(self, tokens: torch.Tensor, options: dict[str, Any], attention: str) -> torch.Tensor:
        forward = self._forward
        if self._paused or forward is None:
            return tokens
        place = (*options["block"], options.get("block_index", 0), attention)
        forward.ran.add(place)
        if not self.guidance.active:
            return tokens
        (part, number, *_), index = options["block"], options.get("block_index", 0)
        block = f"{part}_blocks.{number}.transformer_blocks.{index}.{attention}"
        grid = unet_grid(tokens, block, forward.items, options)
        return self.guidance.apply(tokens, block=block, grid=grid)

    def _apply(self, tokens: torch.Tensor, block: str) -> torch.Tensor:
        return self.guidance.apply(tokens, block=block, inplace=True)

    @contextmanager
    def _blocks(self, model: nn.Module, x: torch.Tensor, active: bool) -> Iterator[ForwardTokens]:
        """Guides the attention modules of the forwards inside, or watches whether they run."""
        with self._reached(model, x, active) as forward:
            outer, self._forward = self._forward, forward
            try:
                yield forward
            finally:
                self._forward = outer

    def _reached(
        self, model: nn.Module, x: torch.Tensor, active: bool
    ) -> AbstractContextManager[ForwardTokens]:
        if type(model).__name__ == UNET:
            return nullcontext(ForwardTokens(x.shape[0]))
        if model not in self._attentions:
            self._attentions[model] = attentions_of(model)
        attentions = self._attentions[model]
        if active:
            return hooked(model, x, self._apply, attentions)
        if self.run is not None and len(attentions) == self.run.blocks:
            return watched(attentions)
        return nullcontext(ForwardTokens(x.shape[0]))

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        if self._forward is not None:
            self._forward.paused = paused

    def _check_blocks(self, run: Run, blocks: int, active: bool, sigma: float) -> None:
        """Refuses a forward that ran fewer attention modules than another one of its run."""
        if blocks < run.blocks and (active or run.guided):
            raise ValueError(
                f"at sigma {sigma:.3g} the model ran {blocks} of {run.blocks} attention modules: "
                "another node skips some and reuses their earlier outputs, which NegToMe cannot "
                "guide exactly. Remove that node, or guide a model without it"
            )
        run.blocks = max(run.blocks, blocks)

    def _record(
        self,
        executor: Any,
        x: torch.Tensor,
        t: torch.Tensor,
        conditions: tuple[Any, ...],
        options: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> None:
        """Runs the model on the references, in the conditioning of the first item of each group.

        A forward holds at most as many references as the run has items: ComfyUI has reserved memory
        for those.
        """
        assert self.references is not None and self._forward is not None
        groups, model = self.guidance.groups, executor.class_obj
        items, count = x.shape[0] // groups, len(self.references.settings)
        firsts = torch.arange(groups, device="cpu") * items
        with _alone(self, options):
            for first in range(0, count, items):
                which = slice(first, min(first + items, count))
                references = self.references.at(t[:1], x, model, which)
                chosen = firsts.repeat_interleave(len(references))
                latents = references.repeat(groups, *[1] * (references.ndim - 1))
                selected_t, selected, others = select_items(
                    (t, conditions, kwargs), x.shape[0], chosen
                )
                self._forward.items = len(latents)
                with self.guidance.record(first, len(references)):
                    executor(latents, selected_t, *selected, options, **others)

    def _time(self, sigma: float) -> float:
        """Returns a sigma on the scale of the configuration's window, 1000 (noise) to 0.

        For flow matching this is the scheduler's timestep; for other models it is only a scale.
        """
        return NOISE * min(sigma / self._highest, 1.0)


def _check_items(batch: int, parts: int, items: int) -> None:
    if batch != parts * items:
        raise ValueError(
            f"this model forward has a batch of {batch}, where the run's {items} images make "
            f"{parts * items} in {parts} condition(s): another node puts tiles, frames or windows "
            "into the batch, and NegToMe would take them for images. Remove that node, or guide a "
            "model without it"
        )


@contextmanager
def _alone(guide: Guide, options: dict[str, Any]) -> Iterator[None]:
    """Pauses the model's other guides, which must not guide this guide's references."""
    wrappers = options.get("wrappers", {}).get(APPLY_MODEL, {}).get(KEY, [])
    guides = [other for other in map(_guide_of, wrappers) if other is not None]
    others = [other for other in guides if other is not guide and not other._paused]
    for other in others:
        other._pause(True)
    try:
        yield
    finally:
        for other in others:
            other._pause(False)


def _guide_of(wrapper: Callable[..., Any]) -> Guide | None:
    owner = getattr(wrapper, "__self__", None)
    return owner if isinstance(owner, Guide) else None


def guides_of(model: Any) -> list[Guide]:
    """Returns the guides that are attached to a ComfyUI MODEL, in their order."""
    guides = map(_guide_of, model.get_wrappers(APPLY_MODEL, KEY))
    return [guide for guide in guides if guide is not None]
