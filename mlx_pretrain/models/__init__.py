"""Flax modules: layers, decoder, encoder."""
