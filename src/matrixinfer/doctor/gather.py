"""Gathers the facts: asks every engine over HTTP, listens to its events and probes it. Every wait has a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeAlias
from urllib.parse import urlsplit

from matrixinfer.app.index_setup import token_blocks
from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import Config, KvEventsConfig
from matrixinfer.doctor import token_samples
from matrixinfer.doctor.event_listener import EventListener, check_replay, listening
from matrixinfer.doctor.facts import FeedFacts, FleetFacts, Following, PodFacts, ProbeFacts
from matrixinfer.doctor.probe import Prober
from matrixinfer.doctor.redis_facts import gather_redis_facts
from matrixinfer.gateway.session import client_session
from matrixinfer.kvevents.follower import feed_sources
from matrixinfer.pods.engine_api import (
    Answer,
    EngineApi,
    EngineDown,
    parse_kv_sources,
    parse_metrics,
    parse_models,
    parse_version,
)
from matrixinfer.pods.registry import EngineMetrics, Pod, PodRegistry
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.remote import RemoteTokenizer

MAX_PODS = 8
"""Pods that are checked at the same time."""

OnStep: TypeAlias = Callable[[str, str], None]
"""Called with a pod's name and the current step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answers:
    """An engine's answers to the requests that the gateway makes as well."""

    version: str | None
    models_status: int | None
    sources_status: int | None
    sources: tuple[KvEventsConfig, ...]
    metrics: EngineMetrics
    clock_ahead: float | None


async def gather_facts(config: Config, *, probes: bool, patience: float, on_step: OnStep) -> FleetFacts:
    """Gather the facts of the whole fleet. Each answer, connection and event may take `patience` seconds.

    Raises `ConfigError` when a configured tokenizer cannot be loaded.
    """
    blocks = token_blocks(config.blocks)
    registry = PodRegistry(config.pods, config.models, config.pod_watch, clock=time.monotonic)
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(client_session(config.limits))
        remote = RemoteTokenizer(session, rests=False)
        tokenizers = await stack.enter_async_context(
            TokenizerManager(config.models, config.tokenization, remote, block_size=blocks.block_size)
        )
        api = EngineApi(session, patience)
        prober = Prober(
            session=session, api=api, tokenizers=tokenizers, registry=registry, blocks=blocks, patience=patience
        )
        gatherer = _PodGatherer(
            config=config,
            registry=registry,
            api=api,
            tokenizers=tokenizers,
            remote=remote,
            prober=prober if probes else None,
            blocks=blocks,
            patience=patience,
            on_step=on_step,
        )
        limit = asyncio.Semaphore(MAX_PODS)

        async def gather(pod: Pod) -> PodFacts:
            async with limit:
                return await gatherer.gather(pod)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(gather(pod)) for pod in registry.pods]
    redis = None
    if config.redis is not None:
        on_step("Redis", "asking")
        redis = await gather_redis_facts(
            config, config.redis, blocks, registry, [task.result() for task in tasks], patience
        )
        on_step("Redis", "done")
    return FleetFacts(
        models=config.models,
        pods=[task.result() for task in tasks],
        redis=redis,
        endpoints=[endpoint.name for pod in registry.pods for endpoint in pod.endpoints],
    )


@dataclass(frozen=True, kw_only=True)
class _PodGatherer:
    config: Config
    registry: PodRegistry
    api: EngineApi
    tokenizers: TokenizerManager
    remote: RemoteTokenizer
    prober: Prober | None
    blocks: TokenBlockProcessor
    patience: float
    on_step: OnStep

    async def gather(self, pod: Pod) -> PodFacts:
        """All facts about one pod."""
        kv_events = pod.config.kv_events
        following: Following = kv_events if isinstance(kv_events, str) else "configured"
        self.on_step(pod.name, "asking")
        try:
            answers = await self._ask(pod)
        except EngineDown as error:
            return PodFacts(
                name=pod.name,
                url=pod.url,
                host=_host(pod),
                token_block=self.blocks.block_size,
                following=following,
                down=str(error),
            )
        configured = self.registry.configured_name(pod.base_model or self._only_model, [pod])
        self.on_step(pod.name, "comparing token ids")
        compared = await token_samples.compare(
            self.tokenizers, self.remote, pod, configured=configured, seconds=self.patience
        )
        feeds = await self._feeds(pod, answers.metrics.block_size)
        self.on_step(pod.name, "done")
        return PodFacts(
            name=pod.name,
            url=pod.url,
            host=_host(pod),
            token_block=self.blocks.block_size,
            following=following,
            version=answers.version,
            served=pod.served,
            models_status=answers.models_status,
            sources_status=answers.sources_status,
            reported_sources=answers.sources,
            ranks=max(1, len(answers.metrics.ranks)),
            prefix_caching=answers.metrics.prefix_caching,
            block_size=answers.metrics.block_size,
            clock_ahead=answers.clock_ahead,
            samples=compared,
            feeds=feeds,
        )

    @property
    def _only_model(self) -> str:
        """The model of a pod that does not say what it serves, if only one is configured."""
        return self.config.models[0].name if len(self.config.models) == 1 else ""

    async def _ask(self, pod: Pod) -> _Answers:
        """What the engine says about itself. The registry learns it as well. Raises `EngineDown`."""
        before = time.time()
        health = await self.api.ask(f"{pod.url}/health")
        clock_ahead = seconds_ahead(health.date, before, time.time())
        self.registry.answered(pod.name)
        paths = ("version", "v1/models", "kv_event_sources", "metrics")
        version, models, sources, metrics = [await self._answer(f"{pod.url}/{path}") for path in paths]
        reported = parse_kv_sources(sources.body, host=_host(pod))
        load = parse_metrics(metrics.body, read_at=self.registry.clock())
        self.registry.measured(pod.name, load)
        discovered = reported if pod.config.kv_events == "discover" else None
        self.registry.learn(pod.name, served=parse_models(models.body), kv_sources=discovered)
        return _Answers(
            version=parse_version(version.body),
            models_status=models.status or None,
            sources_status=sources.status or None,
            sources=reported,
            metrics=load,
            clock_ahead=clock_ahead,
        )

    async def _answer(self, url: str) -> Answer:
        """The answer; an empty one with status 0 if there is none."""
        try:
            return await self.api.ask(url)
        except EngineDown:
            return Answer(status=0, body=b"", date=None)

    async def _feeds(self, pod: Pod, engine_block: int | None) -> Sequence[FeedFacts]:
        """Connect to the pod's publishers, probe them one after the other, and ask each for a replay."""
        sources = list(feed_sources(pod, [model.name for model in self.config.models]))
        if not sources:
            return ()
        self.on_step(pod.name, "connecting to its events")
        async with listening(sources, self.blocks, self.patience) as listener:
            probed = {}
            if self.prober is not None:
                self.on_step(pod.name, "probing")
                for endpoint, source in zip(pod.endpoints, sources, strict=True):
                    probed[endpoint.name] = await self.prober.probe(endpoint, source.model, listener, engine_block)
            self.on_step(pod.name, "asking for a replay")
            return [await self._facts(listener, source.name, probed) for source in sources]

    async def _facts(self, listener: EventListener, name: str, probed: dict[str, ProbeFacts]) -> FeedFacts:
        publisher = listener.publishers[name]
        replay = await check_replay(publisher, self.patience)
        return publisher.facts(connected=listener.is_connected(name), replay=replay, probe=probed.get(name))


def seconds_ahead(date: str | None, before: float, after: float) -> float | None:
    """Seconds by which a clock that showed `date` between `before` and `after` is at least ahead, or behind if negative.

    The Date header has whole seconds, rounded down.
    """
    if date is None:
        return None
    try:
        shown = parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None
    if shown > after:
        return shown - after
    return min(0.0, shown + 1 - before)


def _host(pod: Pod) -> str:
    return urlsplit(pod.url).hostname or ""
