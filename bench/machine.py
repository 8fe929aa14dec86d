"""What a result was measured on: that of the package, for the benchmarks."""

from negtome_fast.provenance import describe, slug

__all__ = ["describe", "slug"]
