"""Count each request in Redis exactly once, and durably."""
