"""Benchmarks: `python -m bench`. `docs/benchmarks.md` explains the figures."""
