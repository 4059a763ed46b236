"""Owns text <-> tokens and the life of one request: templates, tokenizers, detokenizing, stop strings."""
