"""The parts of `negtome-fast tune` (negtome_fast/cli/commands/tune.py).

space: configurations that can fit. predict: their order. candidates: those that compile well.
launches: compile them as they are launched. measure: the right and fastest one. tables: write it.
run: all of this in one run. compile_report: tables of what the compiler made.
"""
