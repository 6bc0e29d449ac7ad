"""Conversion of models and tokenizers from Hugging Face folders and GGUF files, and to Hugging Face folders."""
