"""Benchmarks: `python -m bench`. What the figures mean is told in `docs/benchmarks.md`."""
