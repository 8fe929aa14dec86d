"""Caches across steps: diffusers' own, and those that skip blocks: cache-dit's, step caches.

A cache skips blocks of a forward in which little has changed, and adds what they gave in an earlier
forward. Guidance is exact with it if every forward inside the window and of the first timestep
after it runs all blocks. `CacheGuard` checks that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .blocks import output_projection
from .compiled import is_compiled
from .replaced_forwards import replaced_forward, replacement_of

_ADVICE = (
    "let it compute all steps of the window and the one after it: max_warmup_steps of cache-dit's "
    "DBCacheConfig, warmup_steps of ParaAttention (in forwards, where a step takes several)"
)

MARKED = "a cache that skips blocks"
"""Words for the caches of libraries that mark the model."""


def refuse_cache(model: nn.Module) -> None:
    """Refuses diffusers' caches, which reuse outputs of other steps, guided or not."""
    if getattr(model, "is_cache_enabled", False):
        raise ValueError(
            f"{type(model).__name__} has a cache enabled, which would mix guided and unguided "
            "steps; call its disable_cache() before guiding it"
        )


def is_marked(model: nn.Module) -> bool:
    """Returns True if a library says that its cache, which skips blocks, is on the model.

    cache-dit, ParaAttention and nunchaku mark the model. vLLM-Omni's TeaCache has an entry in its
    registry. xDiT replaces `forward` or, for FLUX.2, the blocks by a module.
    """
    if getattr(model, "_is_cached", False):
        return True
    if "teacache" in getattr(getattr(model, "_hook_registry", None), "_hooks", ()):
        return True
    if "xfuser" not in sys.modules:
        return False
    forward = getattr(model.__dict__.get("forward"), "__func__", None)
    places = [getattr(forward, "__globals__", {}).get("__name__", "")]
    places += [type(block).__module__ for part in model.children() for block in part.children()]
    return any(place.startswith("xfuser.model_executor.cache") for place in places)


def skipping(model: nn.Module, modules: Mapping[nn.Module, str]) -> str | None:
    """Returns what may skip some of a model's attention modules, in words; None if nothing may.

    Args:
        model: the denoiser.
        modules: its attention modules and their names.
    """
    if is_marked(model):
        return MARKED
    replacement = replaced_forward(model, modules)
    return None if replacement is None else f"a forward that may skip blocks, {replacement}"


def check_cache(
    model: nn.Module, cache: str | None, references: bool, compiled: bool = False
) -> None:
    """Refuses guidance that cannot be exact with what may skip blocks, if there is any.

    Args:
        model: the denoiser.
        cache: what `skipping` returned.
        references: the model is to be guided by references from outside of the batch.
        compiled: it is called through `torch.compile(model)`.

    Raises:
        ValueError: the message says what has to go.
    """
    if cache is None:
        return
    name = type(model).__name__
    if references:
        raise ValueError(
            f"{name} has {cache}, in which the references' forward would count and leave its "
            "outputs; remove it, or guide without references"
        )
    if compiled or is_compiled(model):
        raise ValueError(
            f"{name} is compiled and has {cache}, and compiled code does not show which blocks "
            "were skipped; remove it, or guide the model uncompiled"
        )
    if _predicts(model):
        raise ValueError(
            f"the cache of {name} predicts outputs from several earlier forwards (TaylorSeer or "
            "another calibrator), guided ones among them; use it without"
        )


def _predicts(model: nn.Module) -> bool:
    """Returns True if outputs are extrapolated from several forwards."""
    settings: dict[str, Any] = getattr(model, "_context_kwargs", None) or {}  # cache-dit
    if settings.get("calibrator_config") is not None:
        return True
    module = sys.modules.get("para_attn.first_block_cache.utils")
    current = module.get_current_cache_context() if module else None
    return bool(getattr(current, "enable_taylorseer", False))


class CacheGuard:
    """Checks that no attention module is skipped inside the window and right after it.

    Args:
        model: the denoiser.
        modules: all of its attention modules on image tokens, guided or not: guiding one changes
            the outputs of the others, which the cache keeps.
        cache: what may skip them, in words.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module], cache: str) -> None:
        self._name = type(model).__name__
        self._cache = cache
        self._modules = {_witness(module): module for module in modules}
        self._ran: set[nn.Module] = set()
        self._handles: list[RemovableHandle] = []
        self._active = False
        self._timestep = 0.0
        self._first_after: float | None = None

    def begin(self, active: bool, timestep: float) -> bool:
        """Opens a forward; returns False if no forward has to be checked any more."""
        if active:
            self._first_after = None
        elif self._first_after is None:
            self._first_after = timestep
        elif timestep != self._first_after:
            return False
        self._active, self._timestep = active, timestep
        self._ran.clear()
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._note_run))
        return True

    def _note_run(self, module: nn.Module, args: Any) -> None:
        self._ran.add(module)

    def end(self, completed: bool) -> None:
        """Closes the forward, if one is open.

        Raises:
            ValueError: it completed without some of its blocks.
        """
        checked = bool(self._handles)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        skipped = len(self._modules) - len(self._ran)
        if not (checked and completed and skipped):
            return
        skips = (
            f"{self._name} has {self._cache}; it skipped {skipped} of {len(self._modules)} "
            "attention blocks"
        )
        advice = _ADVICE if self._cache == MARKED else _ADVICE.partition(":")[0]
        if self._active:
            raise ValueError(
                f"{skips} at timestep {self._timestep:g}, inside the window, so these were not "
                f"guided; {advice}"
            )
        raise ValueError(
            f"{skips} at timestep {self._timestep:g}, the first after the window, and reused "
            f"their guided outputs; {advice}"
        )


def _witness(module: nn.Module) -> nn.Module:
    """Returns a module that runs whenever an attention module computes its output anew.

    If the attention's own forward was replaced, it may be called and return an earlier output.
    """
    if replacement_of(module) is None:
        return module
    return output_projection(module) or next(module.children(), module)
