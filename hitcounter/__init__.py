"""Count each request in Redis exactly once, and durably."""

__version__ = "0.1.0"
