"""The studies: `negtome-fast eval NAME`."""

from __future__ import annotations

from . import (
    applications,
    conventions,
    diversity,
    hyperparameters,
    nudging,
    overheads,
    protected,
    rivals,
)
from .study import Study

STUDIES: dict[str, Study] = {
    module.STUDY.name: module.STUDY
    for module in (
        diversity,
        conventions,
        hyperparameters,
        rivals,
        overheads,
        protected,
        applications,
        nudging,
    )
}
STUDIES[nudging.COST.name] = nudging.COST

__all__ = ["STUDIES", "Study"]
