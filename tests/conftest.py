"""What holds for every test."""

from __future__ import annotations

from hypothesis import settings

# A busy machine may take any time for one example; how fast the code is, the benchmarks say.
settings.register_profile("project", deadline=None)
settings.load_profile("project")
