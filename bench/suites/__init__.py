"""The benchmarks: one module for each word of `python -m bench`, and one for pytest-benchmark."""
