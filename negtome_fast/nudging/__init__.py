"""Embedding nudging: move latents away from undesired points and toward desired ones.

Source: Zand and Nasr, "Avoiding Generative Model Writer's Block With Embedding Nudging",
arXiv 2408.15450. `objective.py` says which parts are the paper's and which this project chose.
"""

from .attempts import Attempt, NudgedImages, NudgingFailed
from .bank import ReferenceBank
from .encoders import ImageEncoder, default_encoder
from .filters import (
    CallableFilter,
    EncoderSimilarity,
    LatentDistance,
    PerceptualHash,
    PixelDistance,
)
from .loop import generate_with_nudging
from .objective import NudgeResult, nudge
from .schedule import NudgeSchedule
from .selection import select_nearest
from .verdicts import Filter, Verdict, judge

__all__ = [
    "Attempt",
    "CallableFilter",
    "EncoderSimilarity",
    "Filter",
    "ImageEncoder",
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
