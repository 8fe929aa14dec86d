"""Guidance of diffusers pipelines by hooks, and the table of model classes that it knows."""

from ..guidance import BlockRow, GuidanceSummary
from . import families as _families
from .api import NegToMeHandle, apply_negtome, negtome_guidance, remove_negtome
from .encoders import Encoder
from .layouts import ImageTokens, Layout, known_layouts, register_layout
from .parallel import split_with_reference
from .references import Reference

del _families  # importing it fills the table

__all__ = [
    "BlockRow",
    "Encoder",
    "GuidanceSummary",
    "ImageTokens",
    "Layout",
    "NegToMeHandle",
    "Reference",
    "apply_negtome",
    "known_layouts",
    "negtome_guidance",
    "register_layout",
    "remove_negtome",
    "split_with_reference",
]
