"""Code that several test files use: the oracle, cases, small pipelines, programs run apart."""
