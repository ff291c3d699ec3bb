"""What a service's own tests need: a real Valkey, the service served in this process, and a network that fails. In no image."""
