"""Counts requests in Redis, each exactly once and durably."""

__version__ = "0.1.0"
