"""Caches that skip blocks of a forward in which little has changed: cache-dit's and others'.

What the skipped blocks would have added is taken from an earlier forward. Guidance is exact with
them as long as no forward inside the window skips blocks, and none after it takes from one inside:
the forwards of the first timestep after the window must be whole. `CacheWatch` counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .compiled import is_compiled

ADVICE = (
    "let it compute all steps of the window and the one after it: max_warmup_steps of cache-dit's "
    "DBCacheConfig, warmup_steps of ParaAttention (in forwards, where a step takes several)"
)


def skips_blocks(model: nn.Module) -> bool:
    """Whether such a cache is on the model.

    cache-dit, ParaAttention and nunchaku leave a mark on it, vLLM-Omni's TeaCache an entry in its
    registry, and xDiT a `forward` of its own or, for FLUX.2, a module in the place of the blocks.
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


def check_cache(model: nn.Module, references: bool, compiled: bool = False) -> None:
    """Refuses what cannot be right with a cache that skips blocks; nothing where there is none.

    Args:
        references: whether the model is to be guided by references from outside of the batch.
        compiled: it is called through `torch.compile(model)`.

    Raises:
        ValueError: says which of the two has to go.
    """
    if not skips_blocks(model):
        return
    name = type(model).__name__
    if references:
        raise ValueError(
            f"{name} has a cache that skips blocks, in which the references' forward would count "
            "and leave its outputs; take the cache off, or guide without references"
        )
    if compiled or is_compiled(model):
        raise ValueError(
            f"{name} is compiled and has a cache that skips blocks, and which ones it skipped does "
            "not show in compiled code; take the cache off, or guide the model uncompiled"
        )
    if _predicts(model):
        raise ValueError(
            f"the cache of {name} predicts outputs from several earlier forwards (TaylorSeer or "
            "another calibrator), guided ones among them; use it without"
        )


def _predicts(model: nn.Module) -> bool:
    """Whether outputs are extrapolated, rather than taken from the last whole forward."""
    settings: dict[str, Any] = getattr(model, "_context_kwargs", None) or {}  # cache-dit
    if settings.get("calibrator_config") is not None:
        return True
    module = sys.modules.get("para_attn.first_block_cache.utils")
    current = module.get_current_cache_context() if module else None
    return bool(getattr(current, "enable_taylorseer", False))


class CacheWatch:
    """Counts which attention modules of a forward run, while the window or its trace lasts.

    Args:
        model: the denoiser.
        modules: all of its attention modules on image tokens, guided or not: what is guided in
            one changes what others add, and that is what is kept.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        self._name = type(model).__name__
        self._modules = tuple(modules)
        self._ran: set[nn.Module] = set()
        self._handles: list[RemovableHandle] = []
        self._active = False
        self._timestep = 0.0
        self._first_after: float | None = None

    def begin(self, active: bool, timestep: float) -> bool:
        """Opens a forward; returns whether it is watched, or the window's trace is over."""
        if active:
            self._first_after = None
        elif self._first_after is None:
            self._first_after = timestep
        elif timestep != self._first_after:
            return False
        self._active, self._timestep = active, timestep
        self._ran.clear()
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._note))
        return True

    def _note(self, module: nn.Module, args: Any) -> None:
        self._ran.add(module)

    def end(self, completed: bool) -> None:
        """Closes the forward, if one is open.

        Raises:
            ValueError: it completed without some of its blocks.
        """
        watched = bool(self._handles)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        skipped = len(self._modules) - len(self._ran)
        if not (watched and completed and skipped):
            return
        what = f"{self._name}: its cache skipped {skipped} of {len(self._modules)} attention blocks"
        if self._active:
            raise ValueError(
                f"{what} at timestep {self._timestep:g}, inside the window, so these were not "
                f"guided; {ADVICE}"
            )
        raise ValueError(
            f"{what} at timestep {self._timestep:g}, the first after the window, and used what "
            f"they gave when they were guided; {ADVICE}"
        )
