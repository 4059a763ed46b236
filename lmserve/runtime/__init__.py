"""Owns tensors: loading, attention, KV cache, sampling."""
