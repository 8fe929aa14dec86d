"""Embedding nudging: move latents away from undesired points and toward desired ones.

Source: Zand and Nasr, "Avoiding Generative Model Writer's Block With Embedding Nudging",
arXiv 2408.15450. `objective.py` says what of it is the paper's and what is this project's choice.
"""

from .objective import NudgeResult, nudge

__all__ = ["NudgeResult", "nudge"]
