"""`apply_negtome` and `remove_negtome`: guidance of an unmodified diffusers pipeline.

Nothing in the pipeline is copied or replaced: hooks are registered on its denoisers and removed.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..config import NegToMeConfig
from ..guidance import Guidance
from ..statistics import GuidanceSummary
from .block_caches import check_cache, refuse_cache, skipping
from .blocks import attention_modules
from .hooks import ModelHooks, find_hooks, hooks_by_pipeline
from .layouts import UNKNOWN, layout_of
from .parallel_plan import refuse_tensor_parallel, refuse_unknown_sharding
from .references import Reference, References
from .replaced_forwards import refuse_cache_hooks
from .schedule import PipelineSchedule

DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "unet", "unet_2")
"""Attributes of a pipeline that hold the models to guide."""


class NegToMeHandle:
    """A guided pipeline: reads and changes its guidance, and removes it."""

    def __init__(self, hooks: Sequence[ModelHooks]) -> None:
        self._hooks = tuple(hooks)

    @property
    def guidance(self) -> Guidance:
        """The guidance that all blocks of all denoisers share."""
        return self._hooks[0].guidance

    @property
    def config(self) -> NegToMeConfig:
        """The configuration in use."""
        return self.guidance.config

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the attention modules that are guided, `min_grid` not yet considered.

        If a pipeline has two denoisers, a name stands for the module in each.
        """
        return tuple(dict.fromkeys(name for hooks in self._hooks for name in hooks.blocks.values()))

    @property
    def applied(self) -> bool:
        """True until the guidance is removed."""
        return any(hooks.installed for hooks in self._hooks)

    def summary(self) -> GuidanceSummary:
        """Returns the counts of all calls since the guidance was applied or reset; `print` it."""
        for hooks in self._hooks:
            hooks.end_run()
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
            raise RuntimeError("the guidance was removed; call apply_negtome again")
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
        """Removes the guidance; the summary stays. A second call does nothing."""
        for hooks in self._hooks:
            hooks.end_run()
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

    The model is guided in every pipeline that calls it, and may be compiled before or after. The
    prompts, the number of images, the steps and the generator are those of the pipeline that runs,
    which is the one given here or another that holds the model.

    Args:
        pipe: a pipeline with a `transformer`, a `transformer_2`, an `unconditional_transformer`, a
            `unet` or a `unet_2`, all of which are guided as one; or one such model. A warning names
            other components that could be guided. Prefer the pipeline: it knows the exact timesteps
            and the number of steps. (If no pipeline calls a bare model, images from equal seeds
            look like guidance parts; `groups` takes no more parts than leave two images in a
            group.)
        config: the settings; if None, the authors' for the model's family, `preset("flux")` or
            `preset("sdxl")`.
        reference: one `Reference` or several, images or latents from outside of the batch. Every
            item is then pushed away from these, not from others of its batch, and a batch of one
            is enough. Costs on each guided step a forward of the model, with one item per
            reference, prompt and guidance part, and the memory of their tokens in all blocks.
            `"first"` and `"others"` set the configuration's `reference`.
        **overrides: fields of `NegToMeConfig` that replace those of `config`.

    Returns:
        The handle, with `summary()`, `update()`, `reset()` and `remove()`.

    Raises:
        TypeError: `pipe` is neither a pipeline nor a model.
        ValueError: it is guided already; a block filter matches nothing; a cache is enabled with
            which guidance would not be exact; the model is tensor-parallel, or distributed by
            another library than diffusers; its class is unknown and cannot be guided; an override
            has an unknown name; a reference cannot be read or encoded.
        FileNotFoundError: the file of a reference does not exist.

    After an error the pipeline is as it was. A run raises a ValueError if its batch contradicts its
    call, so that it is not known which items belong together; `groups` settles it.
    """
    models, is_pipeline = denoisers_of(pipe)
    if is_pipeline:
        _name_unguided(pipe, models)
    given = reference is not None and not isinstance(reference, str)
    for model, compiled in models.items():
        _check_model(model, references=given, compiled=compiled)
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
    schedule = PipelineSchedule(pipe) if is_pipeline else None
    hooks: list[ModelHooks] = []
    for model, layout in zip(models, layouts, strict=True):
        peer = hooks[0] if hooks else None
        hooks.append(ModelHooks(model, layout, config, schedule, peer, references))
    handle = NegToMeHandle(hooks)
    try:
        for one, compiled in zip(hooks, models.values(), strict=True):
            one.install(compiled)
    except BaseException:
        handle.remove()
        raise
    return handle


def _check_model(model: nn.Module, references: bool, compiled: bool) -> None:
    """Refuses a model that is guided already, or that could not be guided exactly."""
    if find_hooks(model) is not None:
        raise ValueError(
            f"NegToMe is already applied to this {type(model).__name__}; call remove_negtome first"
        )
    refuse_cache(model)
    refuse_cache_hooks(model)
    cache = skipping(model, attention_modules(model, layout_of(model)))
    check_cache(model, cache, references=references, compiled=compiled)
    refuse_tensor_parallel(model)
    refuse_unknown_sharding(model)


def remove_negtome(pipe: Any) -> None:
    """Removes the guidance from a pipeline or model; does nothing if there is none."""
    held = [find_hooks(model) for model in denoisers_of(pipe)[0]]
    # This also covers a pipeline that was guided with another model than it holds now.
    for hooks in [*hooks_by_pipeline(pipe), *held]:
        if hooks is not None:
            hooks.end_run()
            hooks.remove()


@contextmanager
def negtome_guidance(
    pipe: Any,
    config: NegToMeConfig | None = None,
    *,
    reference: Reference | Sequence[Reference] | str | None = None,
    **overrides: Any,
) -> Iterator[NegToMeHandle]:
    """Guides a pipeline inside a `with` block; arguments as `apply_negtome`.

    The guidance is removed at the end of the block, also after an error.
    """
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
        raise ValueError("reference is an empty sequence; give None to guide the batch by itself")
    return list(entries)


def _name_unguided(pipe: Any, models: dict[nn.Module, bool]) -> None:
    """Warns of components that are denoisers by their class and are not guided."""
    for name, model in _other_denoisers(pipe, models).items():
        warnings.warn(
            f"{type(pipe).__name__}.{name} is a {type(model).__name__} too and is not guided; if "
            f"it also makes the images, call apply_negtome(pipe.{name}) as well",
            UserWarning,
            stacklevel=3,
        )


def _other_denoisers(pipe: Any, models: Collection[nn.Module]) -> dict[str, nn.Module]:
    """Returns further components of a pipeline that are denoisers by their class, by name."""
    parts = {name: getattr(part, "_orig_mod", part) for name, part in vars(pipe).items()}
    kinds = {type(model) for model in models}
    return {
        name: part
        for name, part in parts.items()
        if isinstance(part, nn.Module)
        and part not in models
        and (type(part) in kinds or layout_of(part) is not UNKNOWN)
    }


def denoisers_of(pipe: Any) -> tuple[dict[nn.Module, bool], bool]:
    """Finds the denoisers.

    Wan 2.2 has two, `transformer` for the noisy part, then `transformer_2`. Ideogram 4 has one for
    each half of classifier-free guidance.

    Returns:
        Each denoiser, with True if it is compiled; and True if `pipe` is a pipeline.
    """
    is_pipeline = not isinstance(pipe, nn.Module)
    parts = [getattr(pipe, name, None) for name in DENOISERS] if is_pipeline else [pipe]
    # torch.compile(model) wraps the model; compiled code does not see the wrapper's hooks.
    shells = [(getattr(part, "_orig_mod", part), part) for part in parts]
    models = {model: shell is not model for model, shell in shells if isinstance(model, nn.Module)}
    if not models:
        others = _other_denoisers(pipe, ()) if hasattr(pipe, "__dict__") else {}
        ways = "".join(f"; give its {name}" for name in others)
        raise TypeError(
            "expected a diffusers pipeline with a transformer or a unet, or such a model, "
            f"not {type(pipe).__name__}{ways}"
        )
    return models, is_pipeline
