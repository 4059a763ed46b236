"""Owns which models are loaded, loading or failed, and the worker processes behind them; and downloads."""
