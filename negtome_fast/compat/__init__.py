"""The authors' names and arguments, so that their scripts run with one import changed.

Their repository is 1jsingh/negtome. `negtome` needs torch only; the pipelines are subclasses of
diffusers' and are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .arguments import NegtomeArgs, update_args
from .function import negtome

if TYPE_CHECKING:
    from .pipelines import FluxNegToMePipeline, StableDiffusionXLNegToMePipeline

__all__ = [
    "FluxNegToMePipeline",
    "NegtomeArgs",
    "StableDiffusionXLNegToMePipeline",
    "negtome",
    "update_args",
]

_PIPELINES = ("FluxNegToMePipeline", "StableDiffusionXLNegToMePipeline")


def __getattr__(name: str) -> Any:
    if name not in _PIPELINES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(".pipelines", __name__)
    except ImportError as error:
        raise ImportError(
            f"{name} needs the extra 'diffusers': pip install 'negtome-fast[diffusers]'"
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PIPELINES})
