"""Models that read a text as a whole: embedding models and cross-encoders."""
