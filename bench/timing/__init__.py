"""Timing of a function: checked first, then timed in turns with others, then its peak memory.

clock         times in turns, summaries, paired ratios
correctness   the result against fp64, before any time is taken
ceilings      the most that this machine can do
memory        peak memory beyond input and result
measure       all of these for one shape
"""
