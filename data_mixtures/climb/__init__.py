"""Climb: from small proxy runs to the share of each language in the training mixture (arXiv 2509.15556)."""
