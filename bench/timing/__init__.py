"""How a function is timed: correct first, then in turns with the others, then its peak memory.

clock         times in turns, summaries, paired ratios
correctness   the result against fp64, before any time is taken
ceilings      what this machine can do at most
memory        peak memory beyond input and result
measure       all of these for one shape
"""
