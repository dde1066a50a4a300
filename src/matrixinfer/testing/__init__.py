"""Tools for the tests of plugin and backend authors: conformance suites and fakes. They need neither pytest nor a network.

`PluginConformance` and `BlockIndexConformance` need `hypothesis` (`pip install 'matrixinfer-gateway[testing]'`); the
fakes need nothing. See `docs/plugins.md`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from matrixinfer.testing.fakes import FakeClock, FakeEngine, candidate, request, services

if TYPE_CHECKING:
    from matrixinfer.testing.block_index import BlockIndexConformance
    from matrixinfer.testing.plugins import PluginConformance

__all__ = [
    "BlockIndexConformance",
    "FakeClock",
    "FakeEngine",
    "PluginConformance",
    "candidate",
    "request",
    "services",
]

# These need hypothesis, which the fakes can do without.
_SUITES = {"BlockIndexConformance": "block_index", "PluginConformance": "plugins"}


def __getattr__(name: str) -> object:
    if name not in _SUITES:
        raise AttributeError(f"module 'matrixinfer.testing' has no attribute {name!r}")
    try:
        value: object = getattr(import_module(f"matrixinfer.testing.{_SUITES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ModuleNotFoundError(
            f"{name} needs hypothesis: pip install 'matrixinfer-gateway[testing]'", name="hypothesis"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
