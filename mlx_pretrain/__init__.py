"""Pretraining of LLaMA-type language models on JAX: train, score, generate, convert."""

import os

# If TensorFlow is installed, epath would use its client for gs:// and spend seconds to import it.
os.environ.setdefault("EPATH_USE_TF", "0")

__version__ = "0.1.0"
