"""A gateway without sockets: a registry of pods, their feeds, and an index to fill with blocks."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.prompts import MODEL
from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import OutliersConfig, PodConfig, PodWatchConfig, SchedulerConfig
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.pods.outliers import Outliers
from matrixinfer.pods.registry import EngineMetrics, PodRegistry, ServedNames
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.routing.audit import Auditor
from matrixinfer.routing.candidates import Candidates
from matrixinfer.routing.decision_log import DecisionLog
from matrixinfer.routing.ladder import LadderRecorder
from matrixinfer.routing.lookup import Lookup
from matrixinfer.routing.prepare import Preparer
from matrixinfer.routing.router import Router
from matrixinfer.routing.sizing import Sizer
from matrixinfer.scheduler.framework import Candidate, Services
from matrixinfer.scheduler.plugin_loader import discover
from matrixinfer.scheduler.scheduler import Scheduler
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.ladder.record import LadderLog
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.trust.cache_views import FeedCaches
from matrixinfer.trust.drift import Drift
from matrixinfer.trust.parity import Parity


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The objects that make a decision."""

    router: Router
    blocks: TokenBlockProcessor
    index: MemoryIndex
    scheduler: Scheduler
    pods: Sequence[str]


def fleet(pods: int, tokenizers: TokenizerManager, scheduler: SchedulerConfig | None = None) -> Fleet:
    """A fleet of `pods` healthy pods under different loads, with an empty index."""
    config = scheduler or SchedulerConfig()
    names = [f"pod-{i}" for i in range(pods)]
    registry = registry_of(names)
    blocks, index = TokenBlockProcessor(), MemoryIndex()
    scheduling = Scheduler(config, Services(clock=time.perf_counter, rng=random.Random(0)), discover())
    feeds = {
        name: PodFeed(Ledger(pod=name, model=MODEL, blocks=blocks, index=index), can_replay=True) for name in names
    }
    for feed in feeds.values():
        feed.replay_ended()  # the engine has no history
    metrics, history, clock = Metrics(), RoutingHistory(), time.monotonic
    load, parity = LoadLedger(clock, config.pending_seconds), Parity(metrics, clock)
    drift = Drift(metrics, lambda name, *, replay: None, clock)
    lookup = Lookup(registry, index, FeedCaches(feeds, drift.doubts))
    sizer = Sizer(max_tokens=config.max_prefix_tokens, reads_bytes=scheduling.reads_bytes)
    outliers = Outliers(OutliersConfig(), clock)
    router = Router(
        registry=registry,
        preparer=Preparer(
            registry, tokenizers, blocks, lookup, parity, sizer, max_prefix_tokens=config.max_prefix_tokens, clock=clock
        ),
        candidates=Candidates(registry, lookup, load, history, config.weights, outliers, reuse=drift.reuse),
        scheduler=scheduling,
        load=load,
        history=history,
        outliers=outliers,
        auditor=Auditor(feeds, parity, drift, lookup, blocks, sizer),
        decisions=DecisionLog(config.decisions_kept),
        metrics=metrics,
        ladder=LadderRecorder(LadderLog(clock), clock),
        clock=clock,
    )
    return Fleet(router=router, blocks=blocks, index=index, scheduler=scheduling, pods=names)


def registry_of(names: Sequence[str]) -> PodRegistry:
    draw = random.Random(0)
    configs = [PodConfig(name=name, url=f"http://{name}:8000", kv_events="none") for name in names]
    registry = PodRegistry(configs, (), PodWatchConfig(stale_after_seconds=3600), time.monotonic)
    served = ServedNames(base_model=MODEL, aliases=frozenset({MODEL}), adapters={})
    for name in names:
        registry.answered(name)
        registry.learn(name, served=served)
        registry.measured(
            name,
            EngineMetrics(
                running=draw.randrange(8),
                waiting=draw.randrange(2),
                cache_usage=draw.random(),
                read_at=time.monotonic(),
            ),
        )
    return registry


class Writable(Protocol):
    """An index that blocks can be added to."""

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None: ...


def fill(index: Writable, pods: Sequence[str], blocks: int, *, seed: int = 1) -> None:
    """Store `blocks` distinct blocks: sessions of 32 to 512 blocks, each held by one to three pods."""
    draw = random.Random(seed)
    while blocks > 0:
        session = [draw.getrandbits(63) for _ in range(min(blocks, draw.randint(32, 512)))]
        for pod in draw.sample(pods, draw.randint(1, 3)):
            index.add(MODEL, pod, session, None)
        blocks -= len(session)


def hold_partly(index: MemoryIndex, pods: Sequence[str], chain: Sequence[int], seed: int) -> None:
    """Add a session that moved between pods: all pods have its first quarter, some a third, three of them most of it."""
    draw = random.Random(seed)
    shares = [0.25] * len(pods) + [0.33] * (len(pods) // 4) + [0.7, 0.85, 0.97]
    for share, pod in zip(shares, [*pods, *draw.sample(pods, len(pods) // 4 + 3)], strict=True):
        index.add(MODEL, pod, chain[: int(len(chain) * share)], None)


def candidates(names: Sequence[str], matches: dict[str, int]) -> list[Candidate]:
    """Pods under different loads, as the scheduler sees them."""
    draw = random.Random(2)
    return [
        Candidate(
            name=name,
            url=f"http://{name}:8000",
            in_flight=draw.randrange(3),
            running=draw.randrange(8),
            waiting=draw.randrange(2),
            cache_usage=draw.random(),
            metrics_age=0.5,
            matched_blocks=matches.get(name, 0),
        )
        for name in names
    ]
