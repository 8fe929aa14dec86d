"""`apply_negtome` and `remove_negtome`: guidance of an unmodified diffusers pipeline.

Nothing of the pipeline is copied or replaced; hooks are put on its denoisers and taken away again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..config import NegToMeConfig
from ..guidance import Guidance, GuidanceSummary
from .block_caches import check_cache
from .hooks import ModelHooks, PipelineSchedule, find_hooks, hooks_by_pipeline, refuse_cache
from .layouts import UNKNOWN, layout_of
from .parallel import refuse_tensor_parallel, refuse_unknown_sharding
from .references import Reference, References

DENOISERS = ("transformer", "transformer_2", "unet")
"""Attributes of a pipeline that hold the models to guide."""


class NegToMeHandle:
    """A guided pipeline: what the guidance did, and how to take it away."""

    def __init__(self, hooks: Sequence[ModelHooks]) -> None:
        self._hooks = tuple(hooks)

    @property
    def guidance(self) -> Guidance:
        """The state that all blocks share, also those of several denoisers."""
        return self._hooks[0].guidance

    @property
    def config(self) -> NegToMeConfig:
        """The configuration in use."""
        return self.guidance.config

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the attention modules that are guided, before `min_grid`.

        Where a pipeline has two denoisers, a name stands for the module of each.
        """
        return tuple(dict.fromkeys(name for hooks in self._hooks for name in hooks.blocks.values()))

    @property
    def applied(self) -> bool:
        """Whether the hooks are on a model."""
        return any(hooks.installed for hooks in self._hooks)

    def summary(self) -> GuidanceSummary:
        """What the guidance did in all calls since it was applied or reset; `print` it."""
        return self.guidance.summary()

    def update(self, config: NegToMeConfig | None = None, **overrides: Any) -> None:
        """Changes the settings from the next step on; may be called between the steps of a run.

        Compiled code stays in use, unless other blocks or another placement are chosen.

        ```python
        for alpha in (0.3, 0.6, 0.9):
            handle.update(alpha=alpha)
            images = pipe(prompt, num_images_per_prompt=4).images
        ```

        Args:
            config: the settings; if None, those in use.
            **overrides: fields of `NegToMeConfig` that replace those of `config`.

        Raises:
            RuntimeError: the guidance was removed.
            TypeError, ValueError: as `apply_negtome`; the settings in use stay.
        """
        if not self.applied:
            raise RuntimeError("the guidance was removed; apply_negtome puts it on again")
        old = self.config
        new = old if config is None else config
        if not isinstance(new, NegToMeConfig):
            raise TypeError(f"config must be a NegToMeConfig, not {type(new).__name__}")
        new = new.with_overrides(**overrides)
        chosen = [hooks.choose_blocks(new) for hooks in self._hooks]
        self.guidance.configure(new)
        for hooks, blocks in zip(self._hooks, chosen, strict=True):
            hooks.guide(blocks, anew=new.placement != old.placement)

    def reset(self) -> None:
        """Forgets the statistics."""
        self.guidance.reset()

    def remove(self) -> None:
        """Takes the guidance away; the summary stays. A second call does nothing."""
        for hooks in self._hooks:
            hooks.remove()


def apply_negtome(
    pipe: Any,
    config: NegToMeConfig | None = None,
    *,
    reference: Reference | Sequence[Reference] | str | None = None,
    **overrides: Any,
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
        pipe: a pipeline with a `transformer`, a `transformer_2` or a `unet`, all of which are
            guided as one, or one such model itself. The pipeline is better: it knows the exact
            timesteps, the number of steps, and whether its batch holds the two halves of
            classifier-free guidance (from a bare model, images made from equal seeds look like
            halves; `groups=1` settles it).
        config: the settings; if None, the authors' for the model's family: `preset("flux")` or
            `preset("sdxl")`.
        reference: one `Reference` or several, images or latents from outside of the batch: every
            item is then pushed away from these, also where it is alone, and not from others of
            its batch. Costs a forward of the model on each guided step, at batch one for each
            reference and guidance group, and the memory of their tokens in all blocks. `"first"`
            and `"others"` are the configuration's `reference`.
        **overrides: fields of `NegToMeConfig` that replace those of `config`.

    Returns:
        The handle, with `summary()`, `reset()` and `remove()`.

    Raises:
        TypeError: `pipe` is neither a pipeline nor a model.
        ValueError: it is guided already; a block filter matches nothing; a cache is enabled with
            which guidance would not be exact; the model is tensor-parallel, or distributed by
            another library than diffusers; its class is unknown and cannot be served; an override
            has an unknown name; a reference cannot be read or encoded. The pipeline is left as it
            was.
        FileNotFoundError: the file of a reference does not exist.
    """
    models, is_pipeline = _denoisers(pipe)
    given = reference is not None and not isinstance(reference, str)
    for model, compiled in models.items():
        if find_hooks(model) is not None:
            raise ValueError(
                f"NegToMe is already applied to this {type(model).__name__}; call remove_negtome "
                "first"
            )
        refuse_cache(model)
        check_cache(model, references=given, compiled=compiled)
        refuse_tensor_parallel(model)
        refuse_unknown_sharding(model)
    layouts = [layout_of(model) for model in models]
    if config is None:
        preset = layouts[0].preset
        config = NegToMeConfig.preset(preset) if preset else NegToMeConfig()
    if not isinstance(config, NegToMeConfig):
        raise TypeError(f"config must be a NegToMeConfig, not {type(config).__name__}")
    if isinstance(reference, str):
        overrides["reference"], reference = reference, None
    config = config.with_overrides(**overrides)
    name = type(next(iter(models))).__name__
    if UNKNOWN in layouts and not is_pipeline:
        raise ValueError(
            f"{name} is not a known class, so the unit of its time input is not known; pass its "
            "pipeline, or describe it with negtome_fast.pipelines.register_layout"
        )
    references = None
    if reference is not None:
        loaded = [entry.load() for entry in _listed(reference)]
        references = References(loaded, layouts[0], name)
        references.check(pipe if is_pipeline else None)
    clock = PipelineSchedule(pipe) if is_pipeline else None
    hooks: list[ModelHooks] = []
    for model, layout in zip(models, layouts, strict=True):
        peer = hooks[0] if hooks else None
        hooks.append(ModelHooks(model, layout, config, clock, peer, references))
    handle = NegToMeHandle(hooks)
    try:
        for one, compiled in zip(hooks, models.values(), strict=True):
            one.install(compiled)
    except BaseException:
        handle.remove()
        raise
    return handle


def remove_negtome(pipe: Any) -> None:
    """Takes the guidance away from a pipeline or model; nothing happens if there is none."""
    held = [find_hooks(model) for model in _denoisers(pipe)[0]]
    # Also where the pipeline was guided with another model than it holds now.
    for hooks in [*hooks_by_pipeline(pipe), *held]:
        if hooks is not None:
            hooks.remove()


@contextmanager
def negtome_guidance(
    pipe: Any,
    config: NegToMeConfig | None = None,
    *,
    reference: Reference | Sequence[Reference] | str | None = None,
    **overrides: Any,
) -> Iterator[NegToMeHandle]:
    """`apply_negtome` for the length of a `with` block; removed also where it raises."""
    handle = apply_negtome(pipe, config, reference=reference, **overrides)
    try:
        yield handle
    finally:
        handle.remove()


def _listed(reference: Reference | Sequence[Reference]) -> list[Reference]:
    entries = [reference] if isinstance(reference, Reference) else reference
    if not isinstance(entries, Sequence) or not all(isinstance(e, Reference) for e in entries):
        raise TypeError(
            "reference must be a Reference or a sequence of them, such as "
            f'Reference("image.png"), not {reference!r:.80}'
        )
    if not entries:
        raise ValueError("reference is an empty sequence; None guides the batch by itself")
    return list(entries)


def _denoisers(pipe: Any) -> tuple[dict[nn.Module, bool], bool]:
    """The models that predict the noise, with whether each is compiled; whether pipe is a pipeline.

    Wan 2.2 has two: `transformer` for the noisy part of the run, `transformer_2` for the rest.
    """
    is_pipeline = not isinstance(pipe, nn.Module)
    parts = [getattr(pipe, name, None) for name in DENOISERS] if is_pipeline else [pipe]
    # torch.compile(model) is a shell whose hooks the compiled code does not see.
    shells = [(getattr(part, "_orig_mod", part), part) for part in parts]
    models = {model: shell is not model for model, shell in shells if isinstance(model, nn.Module)}
    if not models:
        raise TypeError(
            "expected a diffusers pipeline with a transformer or a unet, or such a model, "
            f"not {type(pipe).__name__}"
        )
    return models, is_pipeline
