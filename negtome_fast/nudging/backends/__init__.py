"""The descent of `nudge`: `naive` (the definition), `torch_backend`, and `triton_backend`.

Each module has a function `nudge(call, out, trace)`, which writes the moved latents to `out` and,
unless it is None, the objective to `trace`, and returns distance, steps and reason, each `(B,)`.
"""
