"""Engines shared by the scenarios, and the table at the end.

`VLLM_DIR` is the folder of the installation (`tests.vllm.install`), `VLLM` the version.
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


@pytest.fixture(scope="session")
def version() -> str:
    """Of vLLM."""
    return _setting("VLLM")


@pytest.fixture(scope="session")
def folder(version: str) -> Path:
    """Where vLLM is installed, and its model is."""
    made = Path(_setting("VLLM_DIR")).resolve()
    if not executable(made, version).exists():
        pytest.exit(f"vLLM {version} is not installed in {made}: `make test-vllm` installs it", returncode=1)
    shutil.rmtree(logs_of(made), ignore_errors=True)
    logs_of(made).mkdir()
    return made


def _setting(name: str) -> str:
    if not os.environ.get(name):
        pytest.exit(f"{name} is not set: run `make test-vllm`", returncode=1)
    return os.environ[name]


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config, folder: Path, version: str) -> Iterator[Results]:
    """What the scenarios compare."""
    made = pytestconfig.stash[_RESULTS] = Results(version)
    yield made
    made.write(folder / f"accuracy-{version}.json")


@pytest.fixture(scope="session")
def model(folder: Path) -> Path:
    """The model's folder."""
    return make_model(folder / "model")


@pytest.fixture(scope="session")
def adapters(folder: Path, model: Path) -> tuple[tuple[str, Path], ...]:
    """LoRA adapters of it."""
    return tuple(
        (name, make_adapter(folder / f"adapter-{name}", model, seed=seed)) for seed, name in enumerate(ADAPTERS)
    )


class Makers:
    """Makes engines that are not started yet."""

    def __init__(self, folder: Path, version: str, model: Path) -> None:
        self._folder = folder
        self._version = version
        self._model = model

    def __call__(self, count: int, options: Options) -> list[Engine]:
        return [
            Engine(
                executable=executable(self._folder, self._version),
                model=self._model,
                options=options,
                folder=self._folder,
                core=number % (os.cpu_count() or 1),
            )
            for number in range(count)
        ]


@pytest.fixture(scope="session")
def make(folder: Path, version: str, model: Path) -> Makers:
    """Makes engines."""
    return Makers(folder, version, model)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engines(make: Makers, adapters: tuple[tuple[str, Path], ...]) -> AsyncIterator[Sequence[Engine]]:
    """Two engines of 400 blocks of 32 tokens, with adapters."""
    async with running(make(2, Options(adapters=adapters))) as started:
        yield started


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table."""
    results = config.stash.get(_RESULTS, None)
    if results is not None:
        terminalreporter.write_sep("=", f"predictions against vLLM {results.version}")
        for line in table({results.version: results}):
            terminalreporter.write_line(line)
