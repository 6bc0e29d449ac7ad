"""Inference: generation with a key-value cache, scoring with shared prefixes, bulk inference over documents."""
