"""Owns the command line: argv in, a configuration out, something runs."""
