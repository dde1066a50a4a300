"""Chooses a pod: filters, scorers and a picker over an immutable snapshot of candidates."""
