"""Guidance of diffusers pipelines by hooks, and the table of model classes that it knows."""

from ..statistics import BlockRow, GuidanceSummary
from . import families as _families
from .api import NegToMeHandle, apply_negtome, negtome_guidance, remove_negtome
from .data_parallel import split_with_reference
from .encoders import ReferenceEncoder
from .layouts import ImageTokens, Layout, known_layouts, register_layout
from .references import Reference

del _families  # importing it fills the table

__all__ = [
    "BlockRow",
    "GuidanceSummary",
    "ImageTokens",
    "Layout",
    "NegToMeHandle",
    "Reference",
    "ReferenceEncoder",
    "apply_negtome",
    "known_layouts",
    "negtome_guidance",
    "register_layout",
    "remove_negtome",
    "split_with_reference",
]
