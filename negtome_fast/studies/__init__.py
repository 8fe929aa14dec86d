"""Measures of images, samplers, rivals and the studies that need them; the core imports none."""

from .measures import FeatureExtractor, attribute_entropy, mean_pairwise_cosine, prompt_agreement

__all__ = ["FeatureExtractor", "attribute_entropy", "mean_pairwise_cosine", "prompt_agreement"]
