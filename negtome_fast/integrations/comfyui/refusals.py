"""Nodes on a model that make its guidance inexact: they are found in a run, and refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

OUTER_SAMPLE = "outer_sample"
APPLY_MODEL = "apply_model"
# Values of comfy.patcher_extension.WrappersMP, repeated here so that the pack can be imported and
# tested without ComfyUI.
COMPILED = "torch.compile"

ORDER = "Put the NegToMe node after that node, nearer to the sampler"


def refuse_inexact_nodes(guider: Any) -> None:
    """Refuses a run whose model another node compiles, or runs from a cache.

    Args:
        guider: ComfyUI's guider when the run begins.

    Raises:
        ValueError: there is such a node.
    """
    patcher = guider.model_patcher
    if patcher.get_wrappers(APPLY_MODEL, COMPILED) or _is_compiled(patcher):
        raise ValueError(
            "NegToMe does not guide a model that was compiled by a node: the compiled code "
            "would not call it. Remove the node that compiles the model"
        )
    options = getattr(guider, "model_options", None) or patcher.model_options
    name = next((name for name in _names(patcher, options) if "cache" in name.lower()), None)
    if name is not None:
        raise ValueError(
            f"a node on this model, {name}, reuses outputs of earlier steps: guided outputs would "
            "appear in steps outside of the window, and steps inside of it would not be guided. "
            "Remove that node, or guide a model without it"
        )


def _is_compiled(patcher: Any) -> bool:
    objects = [*patcher.object_patches.values(), _model(patcher)]
    modules = (part for one in objects if isinstance(one, nn.Module) for part in one.modules())
    return any(
        type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        for module in modules
    )


def _names(patcher: Any, options: dict[str, Any]) -> Iterator[str]:
    """Yields names by which a node can be known that replaces forwards of the model."""
    transformer_options = options.get("transformer_options", {})
    for by_kind in (patcher.wrappers, transformer_options.get("wrappers", {})):
        for by_key in by_kind.values():
            for key, wrappers in by_key.items():
                yield str(key)
                yield from map(_origin, wrappers)
    functions = [options.get("model_function_wrapper"), *vars(_model(patcher)).values()]
    yield from (_origin(function) for function in functions if callable(function))
    yield from (str(key) for key, value in transformer_options.items() if value)


def _model(patcher: Any) -> nn.Module:
    model: nn.Module = patcher.get_model_object("diffusion_model")
    return model


def _origin(function: Any) -> str:
    """Returns the module and name of a function; ComfyUI names modules by their whole path."""
    module = str(getattr(function, "__module__", "") or "").replace("\\", "/")
    inside = module.split("custom_nodes/")[-1] if "custom_nodes/" in module else module
    return f"{inside.rsplit('/', 1)[-1]}.{getattr(function, '__qualname__', '')}"
