"""Which pod holds which block."""
