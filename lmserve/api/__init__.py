"""Owns HTTP: routes, wire schemas, status codes, server-sent events, authentication, limits."""
