"""Owns who runs when, in token ids: requests, scheduler, KV blocks, prefix cache, the loop, the messages."""
