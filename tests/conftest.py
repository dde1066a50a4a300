"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from . import servers

# A busy machine may take any time for one example; how fast the code is, the benchmarks say.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    """A server that tests share; each begins with `flush`."""
    with servers.server(tmp_path_factory.mktemp("valkey")) as server:
        yield server
