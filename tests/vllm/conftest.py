"""The engines that scenarios share, and the table of results at the end.

The environment variable `VLLM_DIR` names the folder of the installation (`tests.vllm.install`), `VLLM` the version.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from .engine import Engine, Options, logs_of, running
from .install import executable
from .model import make_adapter, make_model
from .results import Results, table

_RESULTS = pytest.StashKey[Results]()
ADAPTERS = ("poet", "judge")
OLD = ("0.28.0",)
"""Versions that cannot run every kind of model on a CPU, and do not say where they publish, as the tutorial expects."""
collect_ignore = ["test_kinds.py", "test_tutorial.py"] if os.environ.get("VLLM") in OLD else []


@pytest.fixture(scope="session")
def version() -> str:
    """The version of vLLM."""
    return _setting("VLLM")


@pytest.fixture(scope="session")
def folder(version: str) -> Path:
    """The folder with the vLLM installation and the model."""
    path = Path(_setting("VLLM_DIR")).resolve()
    if not executable(path, version).exists():
        pytest.exit(f"vLLM {version} is not installed in {path}: `make test-vllm` installs it", returncode=1)
    shutil.rmtree(logs_of(path), ignore_errors=True)
    logs_of(path).mkdir()
    return path


def _setting(name: str) -> str:
    if not os.environ.get(name):
        pytest.exit(f"expected the environment variable {name}, it is not set: run `make test-vllm`", returncode=1)
    return os.environ[name]


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config, folder: Path, version: str) -> Iterator[Results]:
    """The results of all scenarios, written to a file at the end."""
    all_results = pytestconfig.stash[_RESULTS] = Results(version)
    yield all_results
    all_results.write(folder / f"accuracy-{version}.json")


@pytest.fixture(scope="session")
def model(folder: Path) -> Path:
    """The model's folder."""
    return make_model(folder / "model")


@pytest.fixture(scope="session")
def adapters(folder: Path, model: Path) -> tuple[tuple[str, Path], ...]:
    """LoRA adapters of the model: names and folders."""
    return tuple(
        (name, make_adapter(folder / f"adapter-{name}", model, seed=seed)) for seed, name in enumerate(ADAPTERS)
    )


class EngineFactory:
    """Makes engines, which the caller starts."""

    def __init__(self, folder: Path, version: str, model: Path) -> None:
        self._folder = folder
        self._version = version
        self._model = model

    def __call__(self, count: int, options: Options, *, model: Path | None = None) -> list[Engine]:
        return [
            Engine(
                executable=executable(self._folder, self._version),
                model=model or self._model,
                options=options,
                folder=self._folder,
                core=number % (os.cpu_count() or 1),
            )
            for number in range(count)
        ]


@pytest.fixture(scope="session")
def make(folder: Path, version: str, model: Path) -> EngineFactory:
    """Makes engines, which the caller starts."""
    return EngineFactory(folder, version, model)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engines(make: EngineFactory, adapters: tuple[tuple[str, Path], ...]) -> AsyncIterator[Sequence[Engine]]:
    """Two engines of 400 blocks of 32 tokens, with adapters."""
    async with running(make(2, Options(adapters=adapters))) as started:
        yield started


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table of results."""
    results = config.stash.get(_RESULTS, None)
    if results is not None:
        terminalreporter.write_sep("=", f"predictions against vLLM {results.version}")
        for line in table({results.version: results}):
            terminalreporter.write_line(line)
