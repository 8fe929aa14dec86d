"""Benchmarks of the operator: `python -m bench` from the root of the repository.

Every number is a ratio measured side by side in one run, on the same tensors, after the result
has been checked against fp64; see `python -m bench --help`.
"""

from . import _path as _path
