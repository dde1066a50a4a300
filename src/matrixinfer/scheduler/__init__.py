"""Chooses a pod: filters, scorers and a picker work on an immutable snapshot of the candidates."""
