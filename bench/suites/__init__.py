"""The benchmarks themselves: one module for each word of `python -m bench`."""
