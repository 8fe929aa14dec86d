"""`Guide`: one NegToMe node at work, around each run and each forward of a ComfyUI model.

It is attached to a clone of the model. Wrappers open and close the steps of a `Guidance`; a UNet's
attention-output patches or `places.hooked` give it the image tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from negtome_fast.config import NOISE, NegToMeConfig
from negtome_fast.guidance import Guidance
from negtome_fast.pipelines.reference_forward import select_items

from .places import UNET, check_model, hooked, image_grid
from .references import ReferenceImages

KEY = "negtome_fast"
# Values of comfy.patcher_extension.WrappersMP, repeated here so that the pack can be imported and
# tested without ComfyUI.
OUTER_SAMPLE = "outer_sample"
APPLY_MODEL = "apply_model"
COMPILED = "torch.compile"


@dataclass(frozen=True)
class Window:
    """The guided part of a run.

    Attributes:
        start, end: both ends, included. In percent, from 0 (noise) to 1 (image) as in ComfyUI's
            other nodes; or in sigmas, the higher one first.
        unit: `"percent"` or `"sigma"`.

    Raises:
        ValueError: the two are out of order or out of range.
    """

    start: float
    end: float
    unit: Literal["percent", "sigma"] = "percent"

    def __post_init__(self) -> None:
        if self.unit == "percent" and not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"a window in percent goes from 0 (noise) to 1 (image), so 0 <= start <= end <= 1, "
                f"not start={self.start:g}, end={self.end:g}"
            )
        if self.unit == "sigma" and not self.start >= self.end >= 0:
            raise ValueError(
                f"a window in sigmas goes from high (noise) to 0 (image), so start >= end >= 0, "
                f"not start={self.start:g}, end={self.end:g}"
            )

    def sigmas(self, model_sampling: Any) -> tuple[float, float]:
        """Returns the (highest, lowest) sigma of the window."""
        if self.unit == "sigma":
            return self.start, self.end
        highest, lowest = map(model_sampling.percent_to_sigma, (self.start, self.end))
        return float(highest), float(lowest)


class Guide:
    """Guides every model that it is attached to; they share its settings and statistics.

    Args:
        title: its name in the summary.
        config: the settings; the window sets t_start and t_end.
        window: the guided steps.
        references: images that guide the batch; None to guide it by its own images.
    """

    def __init__(
        self,
        title: str,
        config: NegToMeConfig,
        window: Window,
        references: ReferenceImages | None = None,
    ) -> None:
        self.title = title
        self.window = window
        self.references = references
        self.guidance = Guidance(config, references.settings if references else ())
        self._highest = 1.0
        self._paused = False

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
        """Wraps a run (OUTER_SAMPLE): sets the window's sigmas and the references' latents."""
        patcher = executor.class_obj.model_patcher
        if patcher.get_wrappers(APPLY_MODEL, COMPILED):
            raise ValueError(
                "NegToMe does not guide a model that was compiled by a node: the compiled code "
                "would not call it. Remove the node that compiles the model"
            )
        model_sampling = patcher.get_model_object("model_sampling")
        self._highest = float(model_sampling.sigma_max)
        highest, lowest = self.window.sigmas(model_sampling)
        if lowest > self._highest:
            raise ValueError(
                f"the window ends at sigma {lowest:g}, above the highest of this model, "
                f"{self._highest:g}, so no step would be guided; give it a lower end"
            )
        settings = {"t_start": self._time(highest), "t_end": self._time(lowest)}
        self.guidance.configure(self.guidance.config.with_overrides(**settings))
        self.guidance.reset()
        self.guidance.begin_run()
        if self.references is not None:
            given = inspect.signature(executor.original).bind(noise, *args, **kwargs).arguments
            self.references.begin_run(patcher.model, noise, given.get("seed") or 0)
        return executor(noise, *args, **kwargs)

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
        into memory. These parts are the guidance groups.
        """
        options = transformer_options or {}
        conditions = (c_concat, c_crossattn, control)
        if self._paused:
            return executor(x, t, *conditions, options, **kwargs)
        diffusion_model = executor.class_obj.diffusion_model
        unet = type(diffusion_model).__name__ == UNET
        grid = None if unet else image_grid(diffusion_model, x)[1:]
        groups = len(options.get("cond_or_uncond") or [0])
        active = self.guidance.begin_step(self._time(float(t.max())), groups=groups, grid=grid)
        completed = False
        try:
            places = hooked(diffusion_model, x, self._apply) if active and not unet else None
            with places or nullcontext():
                if active and self.references is not None:
                    self._record(executor, x, t, conditions, options, kwargs)
                output = executor(x, t, *conditions, options, **kwargs)
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
        if self._paused or not self.guidance.active:
            return tokens
        (part, number, *_), index = options["block"], options.get("block_index", 0)
        shape = options.get("activations_shape")
        return self.guidance.apply(
            tokens,
            block=f"{part}_blocks.{number}.transformer_blocks.{index}.{attention}",
            grid=None if shape is None else (shape[-2], shape[-1]),
        )

    def _apply(self, tokens: torch.Tensor, block: str) -> torch.Tensor:
        if self._paused:
            return tokens
        return self.guidance.apply(tokens, block=block, inplace=True)

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
        assert self.references is not None
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
                with self.guidance.record(first, len(references)):
                    executor(latents, selected_t, *selected, options, **others)

    def _time(self, sigma: float) -> float:
        """Returns a sigma on the scale of the configuration's window, 1000 (noise) to 0.

        For flow matching this is the scheduler's timestep; for other models it is only a scale.
        """
        return NOISE * min(sigma / self._highest, 1.0)


@contextmanager
def _alone(guide: Guide, options: dict[str, Any]) -> Iterator[None]:
    """Pauses the model's other guides, which must not guide this guide's references."""
    wrappers = options.get("wrappers", {}).get(APPLY_MODEL, {}).get(KEY, [])
    guides = [other for other in map(_guide_of, wrappers) if other is not None]
    others = [other for other in guides if other is not guide and not other._paused]
    for other in others:
        other._paused = True
    try:
        yield
    finally:
        for other in others:
            other._paused = False


def _guide_of(wrapper: Callable[..., Any]) -> Guide | None:
    owner = getattr(wrapper, "__self__", None)
    return owner if isinstance(owner, Guide) else None


def guides_of(model: Any) -> list[Guide]:
    """Returns the guides that are attached to a ComfyUI MODEL, in their order."""
    guides = map(_guide_of, model.get_wrappers(APPLY_MODEL, KEY))
    return [guide for guide in guides if guide is not None]
