"""Backends: each has `match(call)` and `guide(call, out)`, as `negtome_fast.naive` defines them.

`torch_backend` runs anywhere; `small` (few tokens), `coarse` (int8 products) and `workers`
(threads) are its parts for CPUs. `triton_backend` runs on GPUs: `triton_geometry` works out its
launches, `triton_coarse` is its variant with int8 products, `triton_runtime` says what can run.
"""
