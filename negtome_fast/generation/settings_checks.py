"""Checks of the fields of `Settings`: types, ranges, and what the batch and the model allow.

All run before a model is loaded or a folder is made. They cover records that strangers wrote, so
nothing is taken for granted of the `Settings` that they get.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .call_checks import check_scale, check_values, shown

if TYPE_CHECKING:
    from ..config import NegToMeConfig
    from ..config import ReferenceSettings as Checked

EMBEDDED = "tiny-flux-avatars"
"""Name of the model that is part of the package."""

MOST = {
    "images": 10_000,
    "steps": 10_000,
    "height": 2**15,
    "width": 2**15,
    "frames": 10_000,
    "fps": 1_000,
}
"""Largest values of counts and sizes; beyond them a run would never end, or fill the memory."""

_TEXTS = ("preset", "negative_prompt", "dtype", "device", "offload", "revision", "variant")
_OPTIONAL = ("steps", "height", "width", "frames", *_TEXTS)
_EMBEDDED_GRID = 8
"""Pixels a side of one token of the embedded model."""


def check_fields(settings: Any) -> None:
    """Check the types and ranges of all fields but the guidance and the references' files.

    Raises:
        TypeError, ValueError: names the field.
    """
    if not isinstance(settings.model, str):
        raise TypeError(f"`model` must be a string, not {shown(settings.model)}")
    for name in _TEXTS:
        value = getattr(settings, name)
        if value is not None and not isinstance(value, str):
            raise TypeError(f"`{name}` must be a string, not {shown(value)}")
    for name in ("compare", "vae_tiling"):
        if not isinstance(getattr(settings, name), bool):
            raise TypeError(f"`{name}` must be true or false, not {shown(getattr(settings, name))}")
    for name, most in MOST.items():
        value = getattr(settings, name)
        if value is not None or name not in _OPTIONAL:
            check_count(name, value, most)
    check_whole("seed", settings.seed)
    for name in ("guidance_scale", "true_cfg_scale"):
        if getattr(settings, name) is not None:
            check_scale(f"`{name}`", getattr(settings, name))
    check_scale("`blur`", settings.blur)
    _check_collections(settings)
    check_values(settings.call)
    check_source(settings)


def check_count(name: str, value: Any, most: int) -> None:
    check_whole(name, value)
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {shown(value)}")
    if value > most:
        raise ValueError(f"`{name}` must be at most {most}, got {shown(value)}")


def check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, not {shown(value)}")


def check_source(settings: Any) -> None:
    """Refuse settings of a model on the Hub for a model that is none.

    Raises:
        ValueError: names the field.
    """
    if settings.model == EMBEDDED:
        for name in ("revision", "variant"):
            if getattr(settings, name) is not None:
                raise ValueError(
                    f"`{name}` {getattr(settings, name)}: the embedded model has only one {name}; "
                    "leave it out, or choose another `model`"
                )
        for name in ("height", "width"):
            if (getattr(settings, name) or _EMBEDDED_GRID) < _EMBEDDED_GRID:
                raise ValueError(
                    f"`{name}` must be at least {_EMBEDDED_GRID} for the embedded model, got "
                    f"{getattr(settings, name)}"
                )
    elif settings.revision is not None and Path(settings.model).expanduser().is_dir():
        raise ValueError(
            f"`revision` {settings.revision}: `model` {settings.model} is a folder, which has no "
            "revisions"
        )


def check_batch(settings: Any, config: NegToMeConfig, drafts: bool) -> None:
    """Check that every image has something to differ from.

    Args:
        settings: the run.
        config: its guidance.
        drafts: True if every image has a draft of its own and a batch of its own.

    Raises:
        ValueError: names the field.
    """
    batch, groups = 1 if drafts else settings.images, config.groups or 1
    if batch % groups:
        raise ValueError(f"`groups` {groups} does not divide the {batch} `images` of a batch")
    if not drafts and not settings.references and batch // groups < 2:
        among = "one image" if groups == 1 else f"one image in each of {groups} `groups`"
        raise ValueError(
            f"{among} has no other to differ from: use 2 or more `images`, or `references`"
        )


def check_mask(settings: Any, checked: Checked, name: str) -> None:
    """Refuse a mask that leaves no token of the embedded model, whose tokens are known.

    Raises:
        ValueError: names the mask.
    """
    from ..masks import mask_on_grid
    from ..models.avatars import IMAGE_SIZE

    height, width = (
        max(1, (size or IMAGE_SIZE) // _EMBEDDED_GRID) for size in (settings.height, settings.width)
    )
    if checked.mask is not None and not mask_on_grid(checked.mask, (1, height, width)).any():
        raise ValueError(
            f"the mask {name} leaves none of the {height} x {width} tokens: white covers less than "
            "half of each. Use a larger region"
        )


def _check_collections(settings: Any) -> None:
    prompts = settings.prompts
    if not isinstance(prompts, (tuple, list)) or not all(isinstance(p, str) for p in prompts):
        raise TypeError(f"`prompts` must be strings, not {shown(prompts)}")
    if not isinstance(settings.references, (tuple, list)):
        raise TypeError(f"`references` must be a sequence, not {shown(settings.references)}")
    for entry in settings.references:
        if not all(hasattr(entry, name) for name in ("image", "mask", "noise")):
            raise TypeError(f"`references` must be of the type ReferenceFile, not {shown(entry)}")
        if not isinstance(entry.image, str) or not isinstance(entry.mask, (str, type(None))):
            raise TypeError(f"`references` must name files, not {shown(entry)}")
        if "\0" in f"{entry.image}{entry.mask}":
            raise ValueError(f"`references` must name files, not {shown(entry)}")
        if not isinstance(entry.noise, bool):
            raise TypeError(f"`references`: noise must be true or false, not {shown(entry.noise)}")
    for name in ("guidance", "call"):
        value = getattr(settings, name)
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise TypeError(f"`{name}` must map names to values, not {shown(value)}")
