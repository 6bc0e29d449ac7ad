"""Models of other formats: Hugging Face folders with safetensors."""
