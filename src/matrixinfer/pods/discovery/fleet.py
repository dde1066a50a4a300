"""Keeps the pods that requests go to at what the sources list, and drains single pods."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol, Self, TypeAlias

import structlog

from matrixinfer.config import PodConfig
from matrixinfer.errors import MatrixInferError
from matrixinfer.pods.discovery.membership import ADMIN, CONFIG, Listed, Membership
from matrixinfer.pods.pod import Drain
from matrixinfer.pods.registry import Pod, PodRegistry

POLL_SECONDS = 0.05
"""Time between two looks at what a pod that is drained has in flight."""

Added: TypeAlias = Literal["added", "changed", "unchanged"]

log = structlog.get_logger(__name__)


class Watched(Protocol):
    """Pods may join it and leave it."""

    def join(self, config: PodConfig) -> None:
        """Add a pod. Raises `ValueError` if there is one of that name."""
        ...

    def leave(self, name: str) -> None:
        """Remove a pod and what is kept about it; its requests may finish. No effect if there is none."""
        ...


class NotHere(MatrixInferError):
    """A pod cannot be changed this way; the message says why, and what to do."""


@dataclass(slots=True)
class SourceState:
    """How a source is doing."""

    failures: int = 0
    """How often it could not be read."""
    error: str | None = None
    """Why it could not be read the last time; None if it could."""
    has_answered: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it has published a list, or has failed."""


class Fleet:
    """The pods, as the membership wants them. Use as an async context manager: it owns the drains.

    `in_flight` is how many requests a pod has.
    """

    def __init__(
        self,
        membership: Membership,
        watched: Watched,
        registry: PodRegistry,
        in_flight: Callable[[Pod], int],
    ) -> None:
        self.membership = membership
        self.states: dict[str, SourceState] = {}
        """By source; only those that are watched."""
        self._watched = watched
        self._registry = registry
        self._in_flight = in_flight
        self._sources: dict[str, str] = {}  # by pod that is there
        self._drains: dict[str, asyncio.Task[None]] = {}
        self._ignored: Mapping[tuple[str, str], str] = {}
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._sources = {pod.name: CONFIG for pod in self._registry.pods}
        self.membership.replace(CONFIG, [pod.config for pod in self._registry.pods])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._drains.values():
            task.cancel()
        await self._group.__aexit__(None, None, None)

    def published(self, source: str, pods: Sequence[PodConfig]) -> None:
        """A source lists these pods from now on."""
        state = self.states.get(source)
        if state is not None:
            if state.error is not None:
                log.info("discovery_resumed", source=source, pods=len(pods))
            state.error = None
            state.has_answered.set()
        if tuple(pods) != self.membership.listed_by(source):
            self.membership.replace(source, pods)
            self.apply()

    def failed(self, source: str, reason: str) -> None:
        """A source could not be read. What it listed last still counts."""
        state = self.states.get(source)
        if state is None:
            return
        state.failures += 1
        if state.error != reason:
            pods = len(self.membership.listed_by(source))
            log.warning("discovery_failed", source=source, reason=reason, pods_kept=pods)
        state.error = reason
        state.has_answered.set()

    def apply(self) -> None:
        """Let pods leave that nobody lists any more, and new ones join. One that is listed otherwise does both."""
        wanted = self.membership.wanted()
        for pod in tuple(self._registry.pods):
            listed = wanted.get(pod.name)
            if listed is None or listed.config != pod.config:
                self._leave(pod.name)
        there = {pod.name for pod in self._registry.pods}
        for name, listed in wanted.items():
            if name not in there:
                self._watched.join(listed.config)
                log.info("pod_joined", pod=name, url=listed.config.url, source=listed.source)
            self._sources[name] = listed.source
        self._warn()

    def source_of(self, name: str) -> str | None:
        """Which source lists the pod; None if none does."""
        listed = self.membership.listed().get(name)
        return None if listed is None else listed.source

    # By operators

    def add(self, config: PodConfig) -> Added:
        """Add a pod, or change one that was added. Raises `NotHere` when another source lists it."""
        pods = {pod.name: pod for pod in self.membership.listed_by(ADMIN)}
        before = self.membership.listed()
        listed = before.get(config.name)
        if listed is not None and listed.source != ADMIN:
            if listed.config == config:
                return "unchanged"
            raise NotHere(f"pod `{config.name}` comes from `{listed.source}`: change it there")
        twin = next(
            (each for each in before.values() if each.config.url == config.url and each.config.name != config.name),
            None,
        )
        if twin is not None:
            raise NotHere(f"`{config.url}` is already the URL of pod `{twin.config.name}`")
        was = pods.get(config.name)
        if was == config:
            return "unchanged"
        pods[config.name] = config
        self.published(ADMIN, tuple(pods.values()))
        return "added" if was is None else "changed"

    def remove(self, name: str) -> bool:
        """Remove a pod that was added; its requests may finish. Returns whether there was one. Raises `NotHere`."""
        pods = [pod for pod in self.membership.listed_by(ADMIN) if pod.name != name]
        if len(pods) < len(self.membership.listed_by(ADMIN)):
            self.published(ADMIN, pods)
            return True
        source = self.source_of(name)
        if source is not None:
            raise NotHere(f"pod `{name}` comes from `{source}`: remove it there, or drain it")
        return False

    def drain(self, name: str, seconds: float) -> bool:
        """Send a pod no more requests, and remove it once it has none in flight, or after `seconds`.

        It stays away until `undrain`, or until its source lists it again after it did not. Returns False if there is no
        such pod.
        """
        if self.membership.is_out(name) or name in self._drains:
            return True
        pod = self._registry.pod(name)
        if pod is None:
            return False
        now = self._registry.clock()
        self._registry.set_drain(pod, Drain(now, now + seconds))
        log.info("pod_drain_started", pod=name, in_flight=self._in_flight(pod), seconds=seconds)
        task = self._group.create_task(self._drain(pod, seconds), name=f"drain {name}")
        self._drains[name] = task
        return True

    def undrain(self, name: str) -> bool:
        """End a drain, or bring back a pod that was drained. Returns False if there is no such pod."""
        task = self._drains.pop(name, None)
        if task is not None:
            task.cancel()
        pod = self._registry.pod(name)
        if pod is not None and pod.drain is not None:
            self._registry.set_drain(pod, None)
            log.info("pod_drain_cancelled", pod=name)
        if self.membership.put_back(name):
            self.apply()
        return self._registry.pod(name) is not None

    def views(self) -> list[dict[str, object]]:
        """Every pod that a source lists, and how it is doing, as JSON-able data."""
        there = {pod.name: pod for pod in self._registry.pods}
        return [self._view(listed, there.get(name)) for name, listed in self.membership.listed().items()]

    def source_views(self) -> list[dict[str, object]]:
        """Every source, as JSON-able data."""
        count = self.membership.listed_by
        own: list[dict[str, object]] = [{"source": each, "pods": len(count(each))} for each in (CONFIG, ADMIN)]
        return own + [
            {"source": source, "pods": len(count(source)), "failures": state.failures, "error": state.error}
            for source, state in self.states.items()
        ]

    def _view(self, listed: Listed, pod: Pod | None) -> dict[str, object]:
        view: dict[str, object] = {
            "name": listed.config.name,
            "url": listed.config.url,
            "source": listed.source,
            "state": "drained" if pod is None else "draining" if pod.drain is not None else "present",
        }
        if pod is not None:
            view |= {"in_flight": self._in_flight(pod), "healthy": pod.healthy, "model": pod.base_model}
        return view

    async def _drain(self, pod: Pod, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._in_flight(pod):  # noqa: ASYNC110 - counts are cheap, and events would cost each request
                    await asyncio.sleep(POLL_SECONDS)
        left = self._in_flight(pod)
        self._drains.pop(pod.name, None)
        self.membership.take_out(pod.name)
        self.apply()
        log.info("pod_drained", pod=pod.name, in_flight=left)

    def _leave(self, name: str) -> None:
        task = self._drains.pop(name, None)
        if task is not None:
            task.cancel()
        self._watched.leave(name)
        log.info("pod_left", pod=name, source=self._sources.pop(name, None))

    def _warn(self) -> None:
        """Log pods that are newly ignored."""
        ignored = self.membership.ignored()
        for (source, name), reason in ignored.items():
            if self._ignored.get((source, name)) != reason:
                log.warning("pod_ignored", pod=name, source=source, reason=reason)
        self._ignored = ignored
