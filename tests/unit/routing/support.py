"""A router put together from real parts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import OutliersConfig, SchedulerConfig
from matrixinfer.index.base import BlockIndex
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.pods.outliers import Outliers
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.routing.audit import Auditor
from matrixinfer.routing.candidates import Candidates
from matrixinfer.routing.decision_log import DecisionLog
from matrixinfer.routing.in_flight import InFlight
from matrixinfer.routing.ladder import LadderRecorder
from matrixinfer.routing.lookup import Lookup
from matrixinfer.routing.prepare import Preparer
from matrixinfer.routing.router import Router
from matrixinfer.routing.sizing import Sizer
from matrixinfer.scheduler.framework import Services
from matrixinfer.scheduler.plugin_loader import discover
from matrixinfer.scheduler.scheduler import Scheduler
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.ladder.record import LadderLog
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.loads import PeerLoads
from matrixinfer.trust.cache_views import FeedCaches, FeedReports
from matrixinfer.trust.drift import Drift
from matrixinfer.trust.media import MediaNames
from matrixinfer.trust.parity import Parity


@dataclass(kw_only=True)
class Parts:
    """Everything that a router needs; what is not given is made."""

    registry: PodRegistry
    tokenizers: TokenizerManager
    blocks: TokenBlockProcessor
    feeds: Mapping[str, PodFeed]
    clock: Callable[[], float] = time.monotonic
    config: SchedulerConfig = field(default_factory=SchedulerConfig)
    index: BlockIndex = field(default_factory=MemoryIndex)
    load: LoadLedger | None = None
    history: RoutingHistory = field(default_factory=RoutingHistory)
    peers: PeerLoads = field(default_factory=PeerLoads)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        clock, config = self.clock, self.config
        load = LoadLedger(clock, config.pending_seconds) if self.load is None else self.load
        self.parity = Parity(self.metrics, clock)
        self.resyncs: list[str] = []
        self.drift = Drift(self.metrics, self._resync, clock, self._reuses_less)
        self.ladder = LadderLog(clock)
        self.decisions = DecisionLog(config.decisions_kept)
        caches = FeedCaches(self.feeds, self.drift.doubts)
        self.feed_reports = FeedReports(self.feeds, caches, self.drift.reuse)
        lookup = Lookup(self.registry, self.index, caches)
        scheduler = Scheduler(config, Services(clock=clock, rng=random.Random(0)), discover())
        sizer = Sizer(max_tokens=config.max_prefix_tokens, reads_bytes=scheduler.reads_bytes)
        self.sizes = sizer.sizes
        self.media = MediaNames(clock)
        self.outliers = Outliers(OutliersConfig(), clock)
        self.router = Router(
            registry=self.registry,
            preparer=Preparer(
                self.registry,
                self.tokenizers,
                self.blocks,
                lookup,
                self.parity,
                sizer,
                media=self.media,
                max_prefix_tokens=config.max_prefix_tokens,
                clock=clock,
            ),
            candidates=Candidates(
                self.registry,
                lookup,
                load,
                self.history,
                config.weights,
                self.outliers,
                self.peers,
                reuse=self.drift.reuse,
            ),
            scheduler=scheduler,
            load=load,
            history=self.history,
            outliers=self.outliers,
            auditor=Auditor(self.feeds, self.parity, self.drift, lookup, self.blocks, sizer, self.media),
            decisions=self.decisions,
            metrics=self.metrics,
            ladder=LadderRecorder(self.ladder, clock),
            clock=clock,
        )

    def _resync(self, name: str, *, replay: bool) -> None:
        self.resyncs.append(name)

    def _reuses_less(self, name: str, is_less: bool) -> None:
        self.feeds[name].ledger.reuses_less(is_less)


class Dispatcher:
    """Dispatches requests that overlap, as a front's tasks would; `finish` ends one."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._contexts: dict[int, AbstractAsyncContextManager[InFlight]] = {}

    async def dispatch(self, path: str, body: bytes, *, request_id: str = "r") -> InFlight:
        context = self._router.dispatch(path, body, request_id=request_id)
        request = await context.__aenter__()
        self._contexts[id(request)] = context
        return request

    async def finish(self, request: InFlight) -> None:
        await self._contexts.pop(id(request)).__aexit__(None, None, None)
