"""MatrixInfer Gateway: sends every LLM request to the pod that already holds its prompt in KV cache.

`import matrixinfer` is the library: an `Index` fed by engines' KV events, and a `Selector` that decides by it. See
`docs/library.md`. Errors are in `matrixinfer.errors`, tools for plugin authors in `matrixinfer.testing`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matrixinfer.errors import MatrixInferError
    from matrixinfer.index.base import IndexStats
    from matrixinfer.routing.embedded_index import Index, PodStatus, Replay
    from matrixinfer.routing.selector import InFlight, Selector
    from matrixinfer.scheduler.framework import Candidate, Decision, Trust

__version__ = "0.1.0"

__all__ = [
    "Candidate",
    "Decision",
    "InFlight",
    "Index",
    "IndexStats",
    "MatrixInferError",
    "PodStatus",
    "Replay",
    "Selector",
    "Trust",
    "__version__",
]

# A command that needs only the version does not wait for the rest.
_HOMES = {
    "Candidate": "scheduler.framework",
    "Decision": "scheduler.framework",
    "InFlight": "routing.selector",
    "Index": "routing.embedded_index",
    "IndexStats": "index.base",
    "MatrixInferError": "errors",
    "PodStatus": "routing.embedded_index",
    "Replay": "routing.embedded_index",
    "Selector": "routing.selector",
    "Trust": "scheduler.framework",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'matrixinfer' has no attribute {name!r}")
    value: object = getattr(import_module(f"matrixinfer.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
