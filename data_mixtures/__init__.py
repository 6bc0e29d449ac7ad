"""Which text in which proportion: documents, tokenizer, SeqIO tasks and mixtures, export to the token store."""
