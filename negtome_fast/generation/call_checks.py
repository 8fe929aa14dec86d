"""Checks of the arguments that a caller adds to a pipeline's call, against its signature.

They are plain values, as JSON has them, so that a record can hold them. An annotation that cannot
be resolved is not checked.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

RESERVED = {
    "prompt": "the settings decide it",
    "generator": "the settings decide it",
    "num_images_per_prompt": "the settings decide it",
    "num_videos_per_prompt": "the settings decide it",
    "latents": "they are drawn from the seeds of the images",
    "output_type": "the settings decide it",
    "return_dict": "the images are taken from the output that the pipeline returns by default",
}
"""Arguments that a run sets itself, with the reason."""

_COUNTS = ("num_inference_steps", "height", "width", "num_frames", "max_sequence_length")
_SCALES = ("guidance_scale", "true_cfg_scale")


def check_values(call: Mapping[str, Any]) -> None:
    """Check what can be checked of any pipeline's arguments.

    Raises:
        TypeError, ValueError: names the argument.
    """
    for name, value in call.items():
        if name in RESERVED:
            raise ValueError(f"`call` {name}: {RESERVED[name]}, so leave it out")
        _check_plain(name, value)
        if name.endswith(_SCALES) and isinstance(value, (int, float)):
            check_scale(f"`call` {name}=", value)
        if name in _COUNTS and isinstance(value, (int, float)) and value < 1:
            raise ValueError(f"`call` {name}={value:g} must be at least 1")


def check_signature(pipeline: type, call: Mapping[str, Any]) -> None:
    """Check the arguments against the annotations of the pipeline's call.

    Raises:
        TypeError: an argument is of another type; names it.
        ValueError: the pipeline has no such argument.
    """
    known = inspect.signature(pipeline.__call__).parameters
    try:
        hints = typing.get_type_hints(pipeline.__call__)
    except Exception:  # an annotation that names what is imported for type checkers only
        hints = {}
    for name, value in call.items():
        if name not in known or name == "self":
            raise ValueError(f"`call` {name}: {pipeline.__name__} has no {name}")
        hint = hints.get(name, Any)
        if value != known[name].default and not _fits(value, hint):
            raise TypeError(
                f"`call` {name}={shown(value)}: {pipeline.__name__} takes {_told(hint)} here"
            )


def shown(value: Any) -> str:
    """Return a value for an error, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def check_scale(field: str, value: Any) -> None:
    """Refuse a scale of classifier-free guidance that is not a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{field} must be a number, not {shown(value)}")
    if not 0 <= value <= 1e6:
        raise ValueError(f"{field} must be a number between 0 and 1,000,000, got {shown(value)}")


def _check_plain(name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_plain(f"{name}.{key}", entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _check_plain(name, entry)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`call` {name}={value} must be finite")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"`call` {name}= an integer of {len(str(value))} digits is too large")
    elif value is not None and not isinstance(value, (str, int, float)):
        raise TypeError(
            f"`call` {name}= must be a plain value, as a record holds it, not "
            f"{type(value).__name__}"
        )


def _fits(value: Any, hint: Any) -> bool:
    """Return True if a plain value may be meant by the annotation.

    Numbers stand for each other, and so do lists and tuples, as in the pipelines themselves.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    kind = origin or hint
    if kind is types.NoneType or value is None:
        return value is None and kind is types.NoneType
    if not isinstance(kind, type):
        return False
    if isinstance(value, str) or kind is str:
        return isinstance(value, str) and kind in (str, object)
    if isinstance(value, bool) or kind is bool:
        return kind is bool and value in (0, 1)
    if isinstance(value, (int, float)):
        return kind in (int, float, complex, object)
    if isinstance(value, Mapping):
        return issubclass(dict, kind)
    entries = parts[0] if parts and Ellipsis not in parts[1:] else Any
    if kind is tuple and len(parts) > 1:
        entries = Union[parts]  # noqa: UP007 (a union of parts that are known at run time)
    listed = issubclass(kind, (list, tuple)) or issubclass(list, kind)
    return listed and all(_fits(entry, entries) for entry in value)


def _told(hint: Any) -> str:
    """Return an annotation in the words of its author, without modules."""
    parts: Sequence[Any] = typing.get_args(hint)
    if typing.get_origin(hint) in (Union, types.UnionType):
        kinds = [_told(part) for part in parts if part is not types.NoneType]
        return " or ".join(dict.fromkeys(kinds))
    if parts:
        return str(hint).replace("typing.", "")
    return getattr(hint, "__name__", str(hint))
