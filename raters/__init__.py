"""MuRating: which documents are worth training on, in many languages (arXiv 2507.01785)."""
