"""Embedding nudging: move latents away from undesired points and toward desired ones.

Source: Zand and Nasr, "Avoiding Generative Model Writer's Block With Embedding Nudging",
arXiv 2408.15450. `objective.py` says what of it is the paper's and what is this project's choice.
"""

from .bank import Encoder, ReferenceBank, default_encoder
from .filters import (
    CallableFilter,
    EncoderSimilarity,
    Filter,
    LatentDistance,
    PerceptualHash,
    PixelDistance,
    Verdict,
    judge,
)
from .loop import (
    Attempt,
    NudgedImages,
    NudgeSchedule,
    NudgingFailed,
    generate_with_nudging,
)
from .objective import NudgeResult, nudge
from .selection import select_nearest

__all__ = [
    "Attempt",
    "CallableFilter",
    "Encoder",
    "EncoderSimilarity",
    "Filter",
    "LatentDistance",
    "NudgeResult",
    "NudgeSchedule",
    "NudgedImages",
    "NudgingFailed",
    "PerceptualHash",
    "PixelDistance",
    "ReferenceBank",
    "Verdict",
    "default_encoder",
    "generate_with_nudging",
    "judge",
    "nudge",
    "select_nearest",
]
