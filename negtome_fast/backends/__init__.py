"""Where the operator is computed: `torch_backend` anywhere, `triton_backend` on a GPU.

Each backend has the two functions of `negtome_fast.naive`: `match` and `guide`.
"""
