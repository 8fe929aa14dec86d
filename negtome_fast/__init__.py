"""NegToMe (negative token merging) for diffusion models: steer away from images, exactly.

Importing this package needs torch alone. Names that need more are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .functional import match_tokens, negtome
from .module import NegToMe

# Not lazily: the first import of the module would put the module in the place of the function.
from .warmup import warmup

if TYPE_CHECKING:
    from .config import NegToMeConfig
    from .guidance import Guidance
    from .nudging import ReferenceBank, generate_with_nudging, nudge
    from .pipelines import (
        Reference,
        apply_negtome,
        negtome_guidance,
        register_layout,
        remove_negtome,
    )

__version__ = "0.1.0"

_LAZY = {
    "NegToMeConfig": ".config",
    "Guidance": ".guidance",
    "apply_negtome": ".pipelines",
    "remove_negtome": ".pipelines",
    "negtome_guidance": ".pipelines",
    "register_layout": ".pipelines",
    "nudge": ".nudging",
    "Reference": ".pipelines",
    "generate_with_nudging": ".nudging",
    "ReferenceBank": ".nudging",
}

__all__ = [
    "Guidance",
    "NegToMe",
    "NegToMeConfig",
    "Reference",
    "ReferenceBank",
    "apply_negtome",
    "generate_with_nudging",
    "match_tokens",
    "negtome",
    "negtome_guidance",
    "nudge",
    "register_layout",
    "remove_negtome",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
