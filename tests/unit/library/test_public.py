"""The public names and their signatures: a change here is a change for everyone who imports the library."""

from __future__ import annotations

import inspect
import subprocess
import sys

import matrixinfer
from matrixinfer import testing

SIGNATURES = {
    "Index": "(*, block_size: 'int' = 128, scheme: 'Scheme' = 'prefix', max_blocks: 'int' = 4000000,"
    " max_recent_blocks: 'int' = 1000000) -> 'None'",
    "Index.apply": "(self, pod: 'str', seq: 'int', payload: 'bytes') -> 'None'",
    "Index.disconnected": "(self, pod: 'str') -> 'None'",
    "Index.follow": "(self, pod: 'str', *, model: 'str', can_replay: 'bool' = False) -> 'None'",
    "Index.forget": "(self, pod: 'str') -> 'None'",
    "Index.heartbeat": "(self, pod: 'str') -> 'Replay | None'",
    "Index.match": "(self, token_ids: 'Tokens', *, model: 'str', salt: 'str | None' = None) -> 'dict[str, int]'",
    "Index.pods": "property",
    "Index.reconnected": "(self, pod: 'str') -> 'None'",
    "Index.replayed": "(self, replay: 'Replay', frames: 'Iterable[tuple[int, bytes]]', *, whole: 'bool' = True)"
    " -> 'None'",
    "Index.resync": "(self, pod: 'str') -> 'None'",
    "Index.stats": "(self) -> 'IndexStats'",
    "Index.status": "(self, pod: 'str') -> 'PodStatus'",
    "Index.trust": "(self, pod: 'str') -> 'Trust'",
    "Index.wanted": "(self, pod: 'str') -> 'Replay | None'",
    "InFlight.cancel": "(self) -> 'None'",
    "InFlight.finish": "(self) -> 'None'",
    "InFlight.first_byte": "(self) -> 'None'",
    "InFlight.move": "(self, candidate: 'Candidate') -> 'None'",
    "Selector": "(index: 'Index', *, policy: 'str | None' = None, config: 'Mapping[str, Any] | None' = None,"
    " clock: 'Callable[[], float]' = <built-in function monotonic>) -> 'None'",
    "Selector.charge": "(self, decision: 'Decision', candidate: 'Candidate | None' = None) -> 'InFlight'",
    "Selector.forget": "(self, pod: 'str') -> 'None'",
    "Selector.rejected": "property",
    "Selector.select": "(self, token_ids: 'Tokens | None', candidates: 'Iterable[Candidate | str]', *, model: 'str',"
    " salt: 'str | None' = None, session: 'str | None' = None, prefix: 'bytes' = b'', request_id: 'str' = '',"
    " dry_run: 'bool' = False) -> 'Decision'",
}


def signatures(kind: type) -> dict[str, str]:
    """The constructor's, and those of what the class itself defines without an underscore."""
    found = {kind.__name__: str(inspect.signature(kind))}
    for name, member in vars(kind).items():
        if not name.startswith("_"):
            shown = str(inspect.signature(member)) if inspect.isfunction(member) else type(member).__name__
            found[f"{kind.__name__}.{name}"] = shown
    return found


def test_the_public_names_and_their_signatures_are_pinned() -> None:
    found = signatures(matrixinfer.Index) | signatures(matrixinfer.Selector) | signatures(matrixinfer.InFlight)
    del found["InFlight"], found["InFlight.candidate"]  # selectors make these
    assert found == SIGNATURES


def test_the_package_offers_what_it_says_and_nothing_else() -> None:
    assert matrixinfer.__all__ == [
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
    for module in (matrixinfer, testing):
        for name in module.__all__:
            assert getattr(module, name) is not None
        assert set(module.__all__) <= set(dir(module))
        assert not hasattr(module, "nothing_of_the_kind")


def test_the_testing_package_offers_what_it_says() -> None:
    assert testing.__all__ == [
        "BlockIndexConformance",
        "FakeClock",
        "FakeEngine",
        "PluginConformance",
        "candidate",
        "request",
        "services",
    ]


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_the_version_costs_no_import() -> None:
    loaded = loaded_by("import matrixinfer; matrixinfer.__version__")
    assert {name for name in loaded if name.startswith("matrixinfer")} == {"matrixinfer"}


def test_the_library_loads_no_server_and_the_fakes_no_hypothesis() -> None:
    loaded = loaded_by("import matrixinfer, matrixinfer.testing; matrixinfer.Selector")
    servers = {"aiohttp", "redis", "uvloop", "zmq", "matrixinfer.gateway", "matrixinfer.telemetry"}
    assert not loaded & {"hypothesis", "pytest", "structlog", *servers}
