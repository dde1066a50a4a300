"""Gathers the facts: asks every engine over HTTP, listens to its events and probes it. Every wait has a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TypeAlias
from urllib.parse import urlsplit

from matrixinfer.app.index_setup import token_blocks
from matrixinfer.app.served import served_models
from matrixinfer.blocks import TokenBlockProcessor, TokenIds
from matrixinfer.config import Config
from matrixinfer.doctor.event_listener import EventListener, check_replay, listening
from matrixinfer.doctor.facts import FeedFacts, FleetFacts, Following, PodFacts, ProbeFacts
from matrixinfer.doctor.probe import Prober
from matrixinfer.doctor.redis_facts import gather_redis_facts
from matrixinfer.kvevents.follower import feed_sources
from matrixinfer.pods.engine_api import About, Answer, EngineApi, EngineDown, OutOfResources, parse_models
from matrixinfer.pods.engine_keys import EngineKeys
from matrixinfer.pods.engine_tls import EngineTls
from matrixinfer.pods.metrics_text import parse_metrics
from matrixinfer.pods.registry import EngineMetrics, Pod, PodRegistry
from matrixinfer.pods.session import client_session
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.finder import TokenizerFinder
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.remote import RemoteTokenizer
from matrixinfer.prompt.samples import SampleFacts, compare
from matrixinfer.prompt.source import Source
from matrixinfer.trust.sent_ids.bodies import CLASSES
from matrixinfer.trust.sent_ids.found import Probed
from matrixinfer.trust.sent_ids.probe import IdsProber

MAX_PODS = 8
"""Pods that are checked at the same time."""

OnStep: TypeAlias = Callable[[str, str], None]
"""Called with a pod's name and the current step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answers:
    """An engine's answers to the requests that the gateway makes as well."""

    about: About
    models_status: int | None
    sources_status: int | None
    metrics: EngineMetrics
    clock_ahead: float | None


async def gather_facts(config: Config, *, probes: bool, patience: float, on_step: OnStep) -> FleetFacts:
    """Gather the facts of the whole fleet. Each answer, connection and event may take `patience` seconds.

    Raises `ConfigError` when a configured tokenizer cannot be loaded.
    """
    blocks = token_blocks(config.blocks)
    registry = PodRegistry(config.pods, config.models, config.pod_watch, clock=time.monotonic)
    async with AsyncExitStack() as stack:
        keys = EngineKeys(config, registry)
        keys.load()
        tls = EngineTls(config, registry)
        tls.load()
        session = await stack.enter_async_context(client_session(keys.for_url, tls.for_url))
        remote = RemoteTokenizer(session, rests=False)
        tokenizers = await stack.enter_async_context(
            TokenizerManager(config.models, config.tokenization, remote, block_size=blocks.block_size)
        )
        finder = TokenizerFinder(
            config.models,
            config.tokenization,
            tokenizers,
            remote,
            fleet=partial(served_models, registry),
            block_size=blocks.block_size,
            answer_seconds=patience,
        )
        api = EngineApi(session, patience)
        prober = Prober(
            session=session, api=api, tokenizers=tokenizers, registry=registry, blocks=blocks, patience=patience
        )
        gatherer = _PodGatherer(
            config=config,
            keys=keys,
            registry=registry,
            api=api,
            tokenizers=tokenizers,
            remote=remote,
            finder=finder,
            prober=prober if probes else None,
            ids_prober=IdsProber(session, tokenizers, registry)
            if probes and config.tokenization.send_ids != "never"
            else None,
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
    keys: EngineKeys
    registry: PodRegistry
    api: EngineApi
    tokenizers: TokenizerManager
    remote: RemoteTokenizer
    finder: TokenizerFinder
    prober: Prober | None
    ids_prober: IdsProber | None
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
        except (EngineDown, OutOfResources) as error:
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
        source, compared = await self._tokens(pod, configured)
        feeds = await self._feeds(pod, answers.metrics)
        sent_ids = await self._sent_ids(pod)
        self.on_step(pod.name, "done")
        return PodFacts(
            name=pod.name,
            url=pod.url,
            host=_host(pod),
            token_block=self.blocks.block_size,
            following=following,
            engine=pod.engine,
            version=None if pod.facts is None else pod.facts.version,
            asleep=answers.metrics.sleep,
            served=pod.served,
            models_status=answers.models_status,
            has_key=self.keys.of(pod) is not None,
            sources_status=answers.sources_status,
            reported_sources=answers.about.sources or (),
            ranks=pod.rank_count,
            prefix_caching=answers.metrics.prefix_caching,
            block_size=answers.metrics.block_size,
            clock_ahead=answers.clock_ahead,
            samples=compared,
            source=source,
            asking=self.remote.costs[configured].view() if configured in self.remote.costs else None,
            wait_ms=self.config.tokenization.wait_milliseconds,
            sent_ids=sent_ids,
            feeds=feeds,
        )

    async def _sent_ids(self, pod: Pod) -> Sequence[Probed]:
        """What the engine does with token ids, if the gateway is to send them. A sleeping engine would answer nothing."""
        if self.ids_prober is None or pod.base_model is None or pod.asleep is not None:
            return ()
        self.on_step(pod.name, "sending token ids")
        return [await self.ids_prober.probe(pod, path) for path in CLASSES]

    async def _tokens(self, pod: Pod, configured: str) -> tuple[Source | None, Sequence[SampleFacts]]:
        """Where the token ids of the pod's model come from, and how they compare with the pod's own."""
        engines = [each for each in served_models(self.registry).get(configured, ()) if each.name == pod.name]
        source = await self.finder.look(configured, engines) if engines else None

        async def ours(prompt: Prompt) -> TokenIds | None:
            tokenized = await self.tokenizers.tokenize(prompt, model=configured, engines=[pod])
            return None if tokenized.source == "remote" else tokenized.tokens.ids

        model = pod.base_model or configured
        return source, await compare(ours, self.remote, pod, model=model, seconds=self.patience)

    @property
    def _only_model(self) -> str:
        """The model of a pod that does not say what it serves, if only one is configured."""
        return self.config.models[0].name if len(self.config.models) == 1 else ""

    async def _ask(self, pod: Pod) -> _Answers:
        """What the engine says about itself. The registry learns it as well. Raises `EngineDown` and `OutOfResources`."""
        before = time.time()
        health = await self.api.ask(f"{pod.url}/health")
        clock_ahead = seconds_ahead(health.date, before, time.time())
        self.registry.answered(pod.name)
        paths = ("v1/models", "kv_event_sources", "metrics")
        models, sources, metrics = [await self._answer(f"{pod.url}/{path}") for path in paths]
        served = parse_models(models.body)
        try:
            about = await self.api.about(pod.url, None if served is None else served.engine)
        except (EngineDown, OutOfResources):
            about = About(facts=None, sources=None)
        discovered = (about.sources or ()) if pod.config.kv_events == "discover" else None
        measured = parse_metrics(metrics.body, read_at=self.registry.clock())
        self.registry.learn(pod.name, served=served, facts=about.facts, kv_sources=discovered)
        self.registry.measured(pod.name, measured)
        return _Answers(
            about=about,
            models_status=models.status or None,
            sources_status=sources.status or None,
            metrics=measured,
            clock_ahead=clock_ahead,
        )

    async def _answer(self, url: str) -> Answer:
        """The answer; an empty one with status 0 if there is none."""
        try:
            return await self.api.ask(url)
        except (EngineDown, OutOfResources):
            return Answer(status=0, body=b"", date=None)

    async def _feeds(self, pod: Pod, metrics: EngineMetrics) -> Sequence[FeedFacts]:
        """Connect to the pod's publishers, probe them one after the other, and ask each for a replay."""
        sources = list(feed_sources(pod, [model.name for model in self.config.models]))
        if not sources:
            return ()
        self.on_step(pod.name, "connecting to its events")
        async with listening(sources, self.blocks, self.patience) as listener:
            probed = {}
            if self.prober is not None and metrics.sleep is None:  # a sleeping engine would compute nothing
                self.on_step(pod.name, "probing")
                models = {source.name: source.model for source in sources}
                for endpoint in pod.endpoints:
                    if endpoint.name not in models:  # a rank that publishes nothing
                        continue
                    probed[endpoint.name] = await self.prober.probe(
                        endpoint, models[endpoint.name], listener, metrics.block_size
                    )
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
