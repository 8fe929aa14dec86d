"""Nudging: how often a memorised image comes out, and what comes out instead.

Two models are compared: the embedded one with its protected characters, and the one that
`negtome_fast.studies.toy_model.overfit` makes. Every method generates each memorised output again,
at most three times, from the same seeds; plain re-seeding is the baseline. The settings were found
on other seeds (docs/nudging.md).
"""

from .cost import COST, table_cost
from .results import figures, goal, table
from .run import STUDY

__all__ = ["COST", "STUDY", "figures", "goal", "table", "table_cost"]
