"""What `bench/gpu_suite.py` runs: `smoke` and `full`, their stages, and the processes of these."""
