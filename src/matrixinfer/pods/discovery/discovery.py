"""Watches the sources of pods that the configuration names."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self, TypeAlias

import structlog

from matrixinfer.config import DnsSource, FileSource, PodConfig
from matrixinfer.errors import ConfigError
from matrixinfer.pods.discovery.dns import DnsPods
from matrixinfer.pods.discovery.file import FilePods
from matrixinfer.pods.discovery.fleet import Fleet, SourceState
from matrixinfer.pods.discovery.source import Source
from matrixinfer.tasks import cancel_and_wait

RETRY_SECONDS = 5.0
"""How long a source rests after a fault of this program."""

SourceConfig: TypeAlias = DnsSource | FileSource

log = structlog.get_logger(__name__)


class Discovery:
    """Hands what each source lists to the fleet. Use as an async context manager: it owns a task per source."""

    def __init__(self, fleet: Fleet, sources: Sequence[SourceConfig]) -> None:
        self._fleet = fleet
        self._sources = tuple(sources)
        self._tasks: dict[SourceConfig, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        await self.replace(self._sources)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks.values():
            await cancel_and_wait(task)

    async def replace(self, sources: Sequence[SourceConfig]) -> None:
        """Watch these sources. Those that were watched before and are the same go on; pods of others leave."""
        for config in [each for each in self._tasks if each not in sources]:
            await cancel_and_wait(self._tasks.pop(config))
        fleet, names = self._fleet, [each.source for each in sources]
        fleet.states = {name: fleet.states.get(name) or SourceState() for name in names}
        fleet.membership.order(names)
        fleet.apply()
        for config in sources:
            if config not in self._tasks:
                self._tasks[config] = asyncio.create_task(self._watch(config), name=config.source)

    async def first_answers(self, seconds: float) -> None:
        """Wait up to `seconds` until every source has published a list or has failed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for state in tuple(self._fleet.states.values()):
                    await state.has_answered.wait()

    async def _watch(self, config: SourceConfig) -> None:
        publish, fail = partial(self._fleet.published, config.source), partial(self._fleet.failed, config.source)
        while True:
            try:
                await source_of(config).watch(publish, fail)
            except Exception as error:
                # Supervision boundary: a fault in one source must not end the gateway.
                log.exception("discovery_crashed", source=config.source)
                fail(f"a fault of the gateway: {type(error).__name__}")
            await asyncio.sleep(RETRY_SECONDS)


def source_of(config: SourceConfig) -> Source:
    """The source that a configuration describes."""
    return DnsPods(config) if isinstance(config, DnsSource) else FilePods(config)


async def listed_now(sources: Sequence[SourceConfig], seconds: float) -> tuple[PodConfig, ...]:
    """What the sources list now, read once. Raises `ConfigError` for one that cannot be read within `seconds`."""
    found: dict[str, PodConfig] = {}
    for config in sources:
        answer: asyncio.Future[Sequence[PodConfig]] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(source_of(config).watch(partial(_answer, answer), partial(_refuse, answer, config)))
        try:
            async with asyncio.timeout(seconds):
                pods = await answer
        except TimeoutError as error:
            raise ConfigError("$.discovery", f"`{config.source}` did not answer within {seconds:g} s") from error
        finally:
            await cancel_and_wait(task)
        for pod in pods:
            found.setdefault(pod.name, pod)
    return tuple(found.values())


def _answer(answer: asyncio.Future[Sequence[PodConfig]], pods: Sequence[PodConfig]) -> None:
    if not answer.done():
        answer.set_result(pods)


def _refuse(answer: asyncio.Future[Sequence[PodConfig]], config: SourceConfig, reason: str) -> None:
    if not answer.done():
        answer.set_exception(ConfigError("$.discovery", f"`{config.source}`: {reason}"))
