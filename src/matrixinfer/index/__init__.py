"""The block index: which pod holds which block."""
