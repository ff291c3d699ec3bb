"""Tools for a service's own tests: a real Valkey, the service served in the test's process, and a network that fails.

No image contains this package, so code that serves must not import it.
"""
