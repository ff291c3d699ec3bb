"""The service starter."""
