"""Flax modules: layers and decoder."""
