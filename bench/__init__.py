"""Benchmarks: `python -m bench --help`, from the root of the repository.

Every ratio is measured side by side in one run, on the same tensors, after the result has been
checked against fp64.
"""

from . import _path as _path
