"""What holds for every test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from aiohttp import web_app
from hypothesis import HealthCheck, settings

from . import servers

# A busy machine may take any time for one example; how fast the code is, the benchmarks say.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")


@pytest.fixture(autouse=True)
def own_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a command that runs in a test sets up for the process, such as logs to a captured stream, ends with the test."""
    configure = structlog.configure

    def without_cache(**options: Any) -> None:
        configure(**{**options, "cache_logger_on_first_use": False})

    monkeypatch.setattr(structlog, "configure", without_cache)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def freed_engines() -> Iterator[None]:
    """aiohttp caches the handlers of the last thousand routes, which keep simulated engines with tokenizers of 90 MB."""
    yield
    web_app._cached_build_middleware.cache_clear()  # noqa: SLF001


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    """A server that tests share; each begins with `flush`."""
    with servers.server(tmp_path_factory.mktemp("valkey")) as server:
        yield server
