"""Models in GGUF files: what transformers' reader takes for something else, or has no place for."""
