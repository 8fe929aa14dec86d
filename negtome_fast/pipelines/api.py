"""`apply_negtome` and `remove_negtome`: guidance of an unmodified diffusers pipeline.

Nothing of the pipeline is copied or replaced; hooks are put on its denoiser and taken away again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..config import NegToMeConfig
from ..guidance import Guidance, GuidanceSummary
from .hooks import ModelHooks, PipelineClock, find_hooks, hooks_by_pipeline, refuse_cache
from .layouts import UNKNOWN, layout_of


class NegToMeHandle:
    """A guided pipeline: what the guidance did, and how to take it away."""

    def __init__(self, hooks: ModelHooks) -> None:
        self._hooks = hooks

    @property
    def guidance(self) -> Guidance:
        """The state that all blocks share."""
        return self._hooks.guidance

    @property
    def config(self) -> NegToMeConfig:
        """The configuration in use."""
        return self._hooks.guidance.config

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the attention modules that are guided, before `min_grid`."""
        return tuple(self._hooks.blocks.values())

    @property
    def applied(self) -> bool:
        """Whether the hooks are on the model."""
        return self._hooks.installed

    def summary(self) -> GuidanceSummary:
        """What the guidance did in all calls since it was applied or reset; `print` it."""
        return self._hooks.guidance.summary()

    def reset(self) -> None:
        """Forgets the statistics."""
        self._hooks.guidance.reset()

    def remove(self) -> None:
        """Takes the guidance away; the summary stays. A second call does nothing."""
        self._hooks.remove()


def apply_negtome(
    pipe: Any, config: NegToMeConfig | None = None, **overrides: Any
) -> NegToMeHandle:
    """Guides a diffusers pipeline from its next call on.

    ```python
    handle = apply_negtome(pipe, alpha=0.9)
    images = pipe(prompt, num_images_per_prompt=4).images
    print(handle.summary())
    remove_negtome(pipe)
    ```

    The model is guided in whatever pipeline calls it, and may be compiled before or after. The
    number of steps and the kind of guidance are asked of the pipeline given here; while another one
    that shares the model runs, they are taken from the scheduler and the latents instead. For a
    scheduler of its own, apply to that pipeline.

    Args:
        pipe: a pipeline with a `transformer` or a `unet`, or that model itself. The pipeline is
            better: it knows the exact timesteps, the number of steps, and whether its batch holds
            the two halves of classifier-free guidance (from a bare model, images made from equal
            seeds look like halves; `groups=1` settles it).
        config: the settings; if None, the authors' for the model's family: `preset("flux")` or
            `preset("sdxl")`.
        **overrides: fields of `NegToMeConfig` that replace those of `config`.

    Returns:
        The handle, with `summary()`, `reset()` and `remove()`.

    Raises:
        TypeError: `pipe` is neither a pipeline nor a model.
        ValueError: it is guided already; a block filter matches nothing; a cache is enabled; the
            model's class is unknown and cannot be served; an override has an unknown name. The
            pipeline is left as it was.
    """
    model, is_pipeline, compiled = _denoiser(pipe)
    name = type(model).__name__
    if find_hooks(model) is not None:
        raise ValueError(f"NegToMe is already applied to this {name}; call remove_negtome first")
    refuse_cache(model)
    layout = layout_of(model)
    if config is None:
        config = NegToMeConfig.preset(layout.preset) if layout.preset else NegToMeConfig()
    if not isinstance(config, NegToMeConfig):
        raise TypeError(f"config must be a NegToMeConfig, not {type(config).__name__}")
    config = config.with_overrides(**overrides)
    if layout is UNKNOWN and not is_pipeline:
        raise ValueError(
            f"{name} is not a known class, so the unit of its time input is not known; pass its "
            "pipeline, or describe it with negtome_fast.pipelines.register_layout"
        )
    if config.steps is not None and not is_pipeline:
        raise ValueError(
            f"steps={config.steps} needs the number of steps of a run, which a bare {name} does "
            "not know; pass the pipeline, or use t_start and t_end"
        )
    hooks = ModelHooks(model, layout, config, PipelineClock(pipe) if is_pipeline else None)
    hooks.install(compiled)
    return NegToMeHandle(hooks)


def remove_negtome(pipe: Any) -> None:
    """Takes the guidance away from a pipeline or model; nothing happens if there is none."""
    hooks = find_hooks(_denoiser(pipe)[0])
    # Also where the pipeline was guided with another model than it holds now.
    for found in [*hooks_by_pipeline(pipe), *([] if hooks is None else [hooks])]:
        found.remove()


@contextmanager
def negtome_guidance(
    pipe: Any, config: NegToMeConfig | None = None, **overrides: Any
) -> Iterator[NegToMeHandle]:
    """`apply_negtome` for the length of a `with` block; removed also where it raises."""
    handle = apply_negtome(pipe, config, **overrides)
    try:
        yield handle
    finally:
        handle.remove()


def _denoiser(pipe: Any) -> tuple[nn.Module, bool, bool]:
    """The model that predicts the noise, whether a pipeline was given, whether it is compiled."""
    is_pipeline = not isinstance(pipe, nn.Module)
    model = pipe
    if is_pipeline:
        parts = [getattr(pipe, name, None) for name in ("transformer", "unet")]
        model = next((part for part in parts if isinstance(part, nn.Module)), None)
    # torch.compile(model) is a shell whose hooks the compiled code does not see.
    shell, model = model, getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise TypeError(
            "expected a diffusers pipeline with a transformer or a unet, or such a model, "
            f"not {type(pipe).__name__}"
        )
    return model, is_pipeline, shell is not model
