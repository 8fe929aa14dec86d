"""Parts of `bench/gpu_suite.py`: `smoke` and `full`, their stages, and the processes of these."""
