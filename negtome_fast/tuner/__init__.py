"""The parts of `negtome-fast tune` (negtome_fast/cli/commands/tune.py).

space: configurations that can fit. predict: their order. candidates: what of them compiles well.
launches: compile them as they are launched. measure: which is right and fastest. tables: write it.
"""
