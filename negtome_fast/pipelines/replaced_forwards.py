"""Forwards that other libraries replaced: diffusers' cache hooks, step caches, token merging.

A replaced forward may return what an earlier forward of the model computed. diffusers keeps its
hooks in a registry on each module. Other libraries assign `module.forward`, or the class's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

from torch import nn

_CACHE_HOOKS = {
    "FBCBlockHook": "apply_first_block_cache",
    "FBCHeadBlockHook": "apply_first_block_cache",
    "FasterCacheBlockHook": "apply_faster_cache",
    "FasterCacheDenoiserHook": "apply_faster_cache",
    "MagCacheBlockHook": "apply_mag_cache",
    "MagCacheHeadHook": "apply_mag_cache",
    "PyramidAttentionBroadcastHook": "apply_pyramid_attention_broadcast",
    "SeaCacheBlockHook": "apply_sea_cache",
    "SeaCacheLeaderBlockHook": "apply_sea_cache",
    "SeaCachePostNormHook": "apply_sea_cache",
    "SeaCacheRootHook": "apply_sea_cache",
    "TaylorSeerCacheHook": "apply_taylorseer_cache",
    "TextKVCacheBlockHook": "apply_text_kv_cache",
    "TextKVCacheTransformerHook": "apply_text_kv_cache",
}
"""Class of a diffusers hook -> the function that registered it."""

_TRANSPARENT = ("diffusers.hooks.hooks", "accelerate.hooks")
"""Modules whose wrappers call the forward that they replaced; their hooks are looked at apart."""


def refuse_cache_hooks(model: nn.Module) -> None:
    """Refuses diffusers' cache hooks, and hooks of others that keep state between forwards.

    `model.enable_cache` marks the model, but `apply_first_block_cache(model)` and the like do not.

    Raises:
        ValueError: there is one; the message names it and says how to remove it.
    """
    found: dict[str, str] = {}
    place = ""
    for module in model.modules():
        registry = module.__dict__.get("_diffusers_hook")  # getattr would be slow
        for key, hook in registry.hooks.items() if registry is not None else ():
            kind = type(hook).__name__
            if kind in _CACHE_HOOKS or getattr(hook, "_is_stateful", False):
                found[key] = _CACHE_HOOKS.get(kind, kind)
                place = place or _name_in(model, module)
    if not found:
        return
    removal = "; ".join(f"registry.remove_hook({key!r})" for key in found)
    raise ValueError(
        f"{type(model).__name__} has a cache, {', '.join(dict.fromkeys(found.values()))} (at "
        f"{place}), which would mix guided and unguided steps; remove it before guiding: registry "
        "= diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model), then "
        f"{removal}"
    )


def _name_in(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, part in model.named_modules() if part is module) or "the model"


def replaced_forward(model: nn.Module, modules: Mapping[nn.Module, str]) -> str | None:
    """Returns the name of a function that replaced a forward and could skip some of the modules.

    The model, the modules and everything between them are looked at. Wrappers of diffusers,
    accelerate and torch.compile, and layers inside of the modules, do not count.

    Args:
        model: the denoiser.
        modules: its attention modules and their names.
    """
    places = {""}
    for name in modules.values():
        parts = name.split(".")
        places.update(".".join(parts[:length]) for length in range(1, len(parts) + 1))
    for place in sorted(places):
        replacement = replacement_of(model.get_submodule(place))
        if replacement is not None:
            return (
                f"{replacement} (in place of {type(model).__name__}{place and '.'}{place}.forward)"
            )
    return None


def replacement_of(module: nn.Module) -> str | None:
    """Returns the name of the function that a module runs instead of its class's own forward."""
    forward = module.__dict__.get("forward", type(module).forward)
    while True:
        inner = getattr(forward, "_torchdynamo_orig_callable", None)
        if inner is None and _is_transparent(forward):
            inner = getattr(forward, "__wrapped__", None)
            if inner is None or inner is getattr(forward, "func", None):
                return None  # an earlier diffusers, which does not tell what it wraps
        if inner is None:
            break
        forward = inner
    if isinstance(forward, MethodType) and forward.__self__ is module:
        forward = forward.__func__
    if not any(vars(base).get("forward") is forward for base in type(module).__mro__):
        return _name_of(forward)
    # The class itself may have been given another function.
    if not isinstance(forward, FunctionType) or forward.__module__.split(".")[0] == "torch":
        return None
    owner = forward.__qualname__.rpartition(".")[0].rpartition(".")[2]
    return None if owner in {base.__name__ for base in type(module).__mro__} else _name_of(forward)


def _is_transparent(forward: Callable[..., Any]) -> bool:
    function = forward.func if isinstance(forward, functools.partial) else forward
    return getattr(function, "__module__", "") in _TRANSPARENT


def _name_of(forward: Any) -> str:
    function = getattr(forward, "func", forward)
    module = getattr(function, "__module__", None) or ""
    return f"{module}.{getattr(function, '__qualname__', type(function).__name__)}"


def may_keep_output(module: nn.Module) -> bool:
    """Returns True if a forward, hook or processor of another library may hold an output."""
    own = module.__dict__  # not getattr: most modules have none of these, and it would be slow
    processor = own.get("processor")
    if processor is not None and not _is_from(processor, "diffusers"):
        return True
    registry = own.get("_diffusers_hook")
    for hook in registry.hooks.values() if registry is not None else ():
        if getattr(hook, "_is_stateful", False) or not _is_from(hook, "diffusers"):
            return True
    if "_hf_hook" in own and not _is_from(own["_hf_hook"], "accelerate"):
        return True
    return "forward" in own and replacement_of(module) is not None


def _is_from(value: Any, library: str) -> bool:
    return type(value).__module__.split(".")[0] == library


def merging_advice(model: nn.Module, block: str) -> str | None:
    """Returns what to do if another library changed the tokens around an attention module.

    Token merging replaces the class of the blocks: fewer tokens reach the attention.

    Args:
        model: the denoiser.
        block: name of the attention module.
    """
    home = type(model).__module__.split(".")[0]
    parts = block.split(".")
    for length in range(len(parts), 0, -1):
        holder = type(model.get_submodule(".".join(parts[:length])))
        library = holder.__module__.split(".")[0]
        if library in (home, "diffusers", "torch"):
            continue
        remedy = f'exclude_blocks=["{parts[-1]}"]'
        if library == "tomesd":
            remedy += ", or take the patch off with tomesd.remove_patch(pipe)"
        return (
            f"the library {library} changed {'.'.join(parts[:length])} (class {holder.__name__}), "
            f"and with it the number of tokens; leave such modules out with {remedy}"
        )
    return None
