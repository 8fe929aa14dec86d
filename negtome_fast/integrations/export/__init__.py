"""Kernels compiled ahead of time, for programs without Python: `negtome-fast export`.

One folder is one operator for one target: the kernels of a call as cubin or hsaco files, a C header
that checks a problem and launches it through the driver API, and a description in JSON. No GPU is
needed. docs/export.md says how to use them.
"""

from .kernel_launches import KernelLaunch, launches
from .operator import Operator
from .run import export, export_all

__all__ = ["KernelLaunch", "Operator", "export", "export_all", "launches"]
