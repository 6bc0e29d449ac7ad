"""Data mixtures: tokenizer, export to the token store, SeqIO tasks and mixtures, choice of the mixture weights."""

import mlx_pretrain  # noqa: F401  before SeqIO and TFDS, as it sets how epath reads gs://
