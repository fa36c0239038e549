"""What the wire formats of model APIs look like: pure functions on bytes, for authors of providers."""
