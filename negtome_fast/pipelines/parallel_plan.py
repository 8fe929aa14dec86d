"""Parallelism of a model: the share of a rank, and the kinds that are refused."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from torch import nn

from .layouts import ImageTokens, Layout
from .parallel import TokenShards

_XDIT_SIZES = (
    "get_sequence_parallel_world_size",
    "get_classifier_free_guidance_world_size",
    "get_pipeline_parallel_world_size",
)


def refuse_tensor_parallel(model: nn.Module) -> None:
    """Refuses tensor parallelism, which shards the channels: a cosine needs them all.

    Parameters that `fully_shard` (FSDP) keeps as DTensors may stay: they are gathered before use.
    """
    sharded = _parallel_config(model, "tensor_parallel_config") is not None
    # Without process groups there are no DTensors, and the parameters need not be searched.
    distributed = "torch.distributed.tensor" in sys.modules and (
        dist.is_available() and dist.is_initialized()
    )
    if not sharded and distributed:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        if not any(isinstance(module, FSDPModule) for module in model.modules()):
            sharded = any(
                isinstance(parameter, DTensor)
                and any(placement.is_shard() for placement in parameter.placements)
                for parameter in model.parameters()
            )
    if sharded:
        raise ValueError(
            f"{type(model).__name__} is tensor-parallel: each rank holds some of the channels of a "
            "token, so tokens cannot be compared; use context parallelism "
            "(diffusers' ContextParallelConfig) or one copy of the model on each device"
        )


def refuse_unknown_sharding(model: nn.Module) -> None:
    """Refuses other libraries' parallelism, which gives a rank some of the tokens or items.

    ParaAttention and cache-dit mark the model; xDiT's process groups say how many share a forward.
    """
    sharded = bool(getattr(model, "_is_parallelized", False))
    xdit = sys.modules.get("xfuser.core.distributed")
    if xdit is not None and type(model).__module__.split(".")[0] == "xfuser":
        sharded = sharded or any(getattr(xdit, size)() > 1 for size in _XDIT_SIZES)
    if sharded:
        raise ValueError(
            f"{type(model).__name__} is distributed by another library than diffusers, so it is "
            "not known which tokens a rank holds; use diffusers' "
            "enable_parallelism(config=ContextParallelConfig(...)), or one copy on each device"
        )


def _parallel_config(model: nn.Module, name: str) -> Any:
    """Returns what diffusers' `enable_parallelism` was given, if anything."""
    return getattr(getattr(model, "_parallel_config", None), name, None)


def token_shards(model: nn.Module, layout: Layout, image: ImageTokens | None) -> TokenShards | None:
    """Returns how the tokens of a context-parallel forward are distributed; None if they are not.

    Args:
        image: the image tokens of the whole forward, where known.

    Raises:
        ValueError: it is not known which tokens a rank holds.
    """
    config = _parallel_config(model, "context_parallel_config")
    if config is None:
        return None
    model_name = type(model).__name__
    if image is None or layout.grid_modules or image.starts is not None:
        raise ValueError(
            f"{model_name} is context-parallel, and it is not known which image tokens a rank "
            "holds, because their number differs between blocks or the captions differ in length; "
            "run it without context parallelism"
        )
    hooks = [(module, hook) for module in model.modules() for hook in _parallel_hooks(module)]
    split = [name for _, hook in hooks if _splits(hook) for name in hook.metadata]
    if layout.joint is not None and "encoder_hidden_states" not in split:
        raise ValueError(
            f"{model_name}: its context-parallel plan does not split the text by itself "
            "(encoder_hidden_states), so it is not known where the image tokens of a rank begin; "
            "run it without context parallelism"
        )
    whole = frozenset(module for module, hook in hooks if not _splits(hook))
    group = config._flattened_mesh.get_group()
    return TokenShards(group, image, whole)


def _parallel_hooks(module: nn.Module) -> list[Any]:
    registry = getattr(module, "_diffusers_hook", None)
    names = ("ContextParallelSplitHook", "ContextParallelGatherHook")
    return [h for h in getattr(registry, "hooks", {}).values() if type(h).__name__ in names]


def _splits(hook: Any) -> bool:
    return type(hook).__name__ == "ContextParallelSplitHook"
