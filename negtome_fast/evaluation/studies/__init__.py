"""The studies: `negtome-fast eval NAME`."""

from __future__ import annotations

from . import applications, conventions, diversity, hyperparameters, protected, rivals
from .study import Study

STUDIES: dict[str, Study] = {
    module.STUDY.name: module.STUDY
    for module in (diversity, conventions, hyperparameters, rivals, protected, applications)
}

__all__ = ["STUDIES", "Study"]
