"""Counts requests in Redis: each once, durably."""

__version__ = "0.1.0"
