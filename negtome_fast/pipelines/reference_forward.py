"""Arguments of the references' forward: the run's own, with the references' latents."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from .layouts import ImageTokens, Layout

_WITHOUT_BATCH = {"img_ids": 2, "txt_ids": 2}
"""Arguments that have no items if they have this many dimensions."""
_NEVER_BATCHED = (
    "image_rotary_emb",
    "rope_interpolation_scale",
    "visual_rope_pos",
    "text_rope_pos",
    "indices_*",
)
"""Patterns of arguments with an entry per token; there may be as many tokens as items."""
_BATCH_AXIS = {"encoder_hidden_states_llama3": 1}
"""HiDream has the states of several layers of its text encoder, (layers, B, tokens, channels)."""
_CACHES = ("kv_cache", "past_key_values")


def reference_call(
    call: inspect.BoundArguments,
    latents_name: str,
    batch: int,
    items: list[int],
    references: Sequence[Tensor],
    tokens: ImageTokens | None,
    layout: Layout,
) -> inspect.BoundArguments:
    """Returns the arguments of a forward of references.

    Args:
        call: the arguments of the run's own forward, `self` first.
        latents_name: name of the argument that holds the latents.
        batch: number of items in the run's own batch.
        items: for each item of the new batch, the item of the run's batch whose conditioning it
            takes.
        references: latents (1, ...) for each item of the new batch.
        tokens: the image tokens, where known.
        layout: layout of the model.
    """
    frame_axis = layout.encode.frame_axis if layout.encode else 2
    frames = tokens.frames if tokens and layout.grid_modules else 1
    lists = isinstance(call.arguments[latents_name], (list, tuple))
    chosen_items = torch.tensor(items, device="cpu")
    selected = inspect.BoundArguments(call.signature, copy.copy(call.arguments))
    for name, value in list(call.arguments.items())[1:]:  # all but self
        chosen = select_items(value, batch, chosen_items, name, lists, frames)
        if name == latents_name:
            chosen = with_latents(chosen, references, tokens, frame_axis)
        selected.arguments[name] = chosen
    return selected


def select_items(
    value: Any,
    batch: int,
    items: Tensor,
    name: str = "",
    lists: bool = False,
    frames: int = 1,
) -> Any:
    """Returns an argument of the model's forward for some items of its batch.

    Items are chosen from tensors whose first dimension is the batch, also inside of mappings,
    tuples and lists, and from lists with an entry for each item. Anything else is returned as it
    is.

    Args:
        value: the argument.
        batch: number of items in the batch.
        items: int64 (n,), the items to return.
        name: name of the argument.
        lists: every list of `batch` entries has one for each item, as in models whose latents are a
            list. Otherwise a list of tensors that each hold the whole batch, ControlNet's for
            example, is treated entry by entry.
        frames: number of frames of an item; arguments may have batch * frames entries.
    """
    if any(fnmatchcase(name, pattern) for pattern in _NEVER_BATCHED):
        return value
    if isinstance(value, Tensor):
        axis = _BATCH_AXIS.get(name, 0)
        batched = value.ndim > axis and value.shape[axis] == batch
        if axis == 0 and frames > 1 and value.ndim > 1 and value.shape[0] == batch * frames:
            by_item = value.unflatten(0, (batch, frames))
            return by_item.index_select(0, items.to(value.device)).flatten(0, 1)
        if not batched or value.ndim == _WITHOUT_BATCH.get(name):
            return value
        return value.index_select(axis, items.to(value.device))
    if isinstance(value, Mapping):
        return {k: select_items(v, batch, items, str(k), lists, frames) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        batches = all(isinstance(v, Tensor) and v.ndim and v.shape[0] == batch for v in value)
        if isinstance(value, list) and len(value) == batch and (lists or not batches):
            return [value[item] for item in items.tolist()]
        selected = (select_items(entry, batch, items, name, lists, frames) for entry in value)
        return type(value)(*selected) if hasattr(value, "_fields") else type(value)(selected)
    return value


def with_latents(
    value: Any,
    references: Sequence[Tensor],
    tokens: ImageTokens | None = None,
    frame_axis: int = 2,
) -> Any:
    """Returns the model's latents with the generated part replaced by the references.

    The conditions of edit and image-to-video pipelines stay: channels and tokens after the
    generated part, tokens and frames before it.

    Args:
        value: latents of the batch, a tensor (B, ...) or a list of B.
        references: latents (1, ...) for each item, of the generated part or of all.
        tokens: the image tokens, where known.
        frame_axis: axis of the frames, in latents (B, ...) of 5 dimensions.
    """
    if isinstance(value, (list, tuple)):
        # If an item is a list, its conditions come first and the generated image last.
        return [
            [*item[:-1], with_latents(item[-1][None], [own])[0]]
            if isinstance(item, (list, tuple))
            else with_latents(item[None], [own])[0]
            for item, own in zip(value, references, strict=True)
        ]
    own, value = torch.cat(list(references)), value.clone()
    place = [slice(0, size) for size in own.shape]
    source = [slice(None)] * own.ndim
    if tokens is not None and own.ndim == 3:
        place[1] = slice(tokens.offset, tokens.offset + tokens.generated)
        if own.shape[1] != tokens.generated:
            source[1] = place[1]
    elif tokens is not None and tokens.grid is not None and own.ndim == 5:
        given = tokens.offset // (tokens.grid[0] * tokens.grid[1])
        if own.shape[frame_axis] == tokens.frames + given:
            place[frame_axis] = source[frame_axis] = slice(given, None)
    value[tuple(place)] = own[tuple(source)]
    return value


def refuse_stateful(arguments: Mapping[str, Any], model: str) -> None:
    """Refuses caches of keys and values: the references' forward would leave its own in them."""
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            refuse_stateful(value, model)
        elif any(cache in name for cache in _CACHES) and not _is_idle(value):
            raise ValueError(
                f"{model} is called with a cache, {name}, which the references' forward would "
                "change; references need a pipeline without it"
            )


def _is_idle(cache: Any) -> bool:
    """Returns True if a cache is empty and stays so, as GLM-Image's is when nothing is edited."""
    layers = getattr(cache, "caches", None)
    return cache is None or (
        isinstance(layers, list)
        and all(layer.mode != "write" and not layer.k_caches for layer in layers)
    )
