"""Parts of `bench/gpu_suite.py`, which runs on a GPU that is rented by the minute.

smoke, full    the stages of the two calls
suite          limits, verdicts and the table at the end
processes      processes with a limit, and their log
launches       kinds of kernels, and launches that avoid the kinds that failed
kinds, checks  checks of a kind of kernel, in its own process
each           time of every kernel by itself
warm           compiles the kernels of a shape
small_run, pytest_outcomes, poison   run under memory checkers and in the tests
"""
