"""Which model types of the pinned transformers can be built tiny, and whether they agree with themselves."""
