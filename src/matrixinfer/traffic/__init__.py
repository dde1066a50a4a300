"""Tracks which requests went to which pod, from this gateway and from others: load, routing history, peers."""
