"""Measures of diversity and of agreement with the prompt, on images in [0, 1]."""

from .measures import FeatureExtractor, attribute_entropy, mean_pairwise_cosine, prompt_agreement

__all__ = ["FeatureExtractor", "attribute_entropy", "mean_pairwise_cosine", "prompt_agreement"]
