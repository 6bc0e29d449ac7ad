"""Which text in which proportion: documents, tokenizer, SeqIO tasks and mixtures, export to the token store."""

import mlx_pretrain  # noqa: F401  before SeqIO and TFDS: it says how epath reads gs://
