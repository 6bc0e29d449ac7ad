"""Pretraining of LLaMA-type language models on JAX: train, score, generate, convert."""

__version__ = "0.1.0"
