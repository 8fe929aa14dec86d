"""Measures of images, samplers, rivals and the studies that need them; the core imports none."""
