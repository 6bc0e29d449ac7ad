"""Inference: generation with a key-value cache."""
