"""Caches across steps: diffusers' own, and those that skip blocks, cache-dit's and others'.

A cache skips blocks of a forward in which little has changed, and adds what they gave in an earlier
forward. Guidance is exact with it if every forward inside the window and of the first timestep
after it runs all blocks. `CacheGuard` checks that.
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


def refuse_cache(model: nn.Module) -> None:
    """Refuses diffusers' caches, which reuse outputs of other steps, guided or not."""
    if getattr(model, "is_cache_enabled", False):
        raise ValueError(
            f"{type(model).__name__} has a cache enabled, which would mix guided and unguided "
            "steps; call its disable_cache() before guiding it"
        )


def skips_blocks(model: nn.Module) -> bool:
    """Returns True if a cache that skips blocks is on the model.

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


def check_cache(model: nn.Module, references: bool, compiled: bool = False) -> None:
    """Refuses guidance that cannot be exact with the cache that skips blocks, if there is one.

    Args:
        references: the model is to be guided by references from outside of the batch.
        compiled: it is called through `torch.compile(model)`.

    Raises:
        ValueError: the message says what has to go.
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
            f"{name} is compiled and has a cache that skips blocks, and compiled code does not "
            "show which blocks were skipped; take the cache off, or guide the model uncompiled"
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
            f"{self._name}: its cache skipped {skipped} of {len(self._modules)} attention blocks"
        )
        if self._active:
            raise ValueError(
                f"{skips} at timestep {self._timestep:g}, inside the window, so these were not "
                f"guided; {ADVICE}"
            )
        raise ValueError(
            f"{skips} at timestep {self._timestep:g}, the first after the window, and reused "
            f"their guided outputs; {ADVICE}"
        )
