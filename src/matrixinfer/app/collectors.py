"""Metrics that are read from the parts at every scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from matrixinfer.index.base import BlockIndex
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.kvevents.limits import name_of
from matrixinfer.kvevents.load_follower import Outcome
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.memory import Memory
from matrixinfer.prompt.source import Kind, Source
from matrixinfer.scheduler.framework import Trust
from matrixinfer.scheduler.scheduler import Scheduler
from matrixinfer.telemetry.log import LogStream
from matrixinfer.trust.levels import trust_in

_STATS = (
    "malformed",
    "wrong_topic",
    "unreadable_events",
    "duplicates",
    "gaps",
    "restarts",
    "truncated",
    "replays",
    "overflows",
    "heartbeats",
    "missed_heartbeats",
    "silent_losses",
)


class IndexCollector(Collector):
    """Size of the block index."""

    def __init__(self, index: BlockIndex) -> None:
        self._index = index

    def collect(self) -> Iterator[Metric]:
        """Read the parts now."""
        stats = self._index.stats()
        yield GaugeMetricFamily("matrixinfer_index_blocks", "Distinct blocks in the index.", value=stats.blocks)
        yield GaugeMetricFamily("matrixinfer_index_bytes", "Memory of the index, estimated.", value=stats.memory_bytes)
        yield CounterMetricFamily(
            "matrixinfer_index_evicted_blocks", "Blocks dropped to stay within maxBlocks.", value=stats.evicted
        )


class KeptCollector(Collector):
    """How many entries each part remembers; each has its own bound."""

    def __init__(self, parts: Mapping[str, Callable[[], int]]) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        """Read the parts now."""
        kept = GaugeMetricFamily("matrixinfer_kept_entries", "Entries that a part remembers.", labels=["part"])
        for part, count in self._parts.items():
            kept.add_metric([part], count())
        yield kept


class MemoryCollector(Collector):
    """What requests hold in memory."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def collect(self) -> Iterator[Metric]:
        """Read the counts now."""
        memory = self._memory
        yield GaugeMetricFamily("matrixinfer_request_bytes", "Memory that requests hold.", value=memory.used)
        yield GaugeMetricFamily("matrixinfer_request_bytes_limit", "Memory that requests may hold.", value=memory.limit)
        yield CounterMetricFamily(
            "matrixinfer_requests_refused", "Requests for which there was no memory left.", value=memory.refused
        )


class LogCollector(Collector):
    """Lines that could not be logged."""

    def __init__(self, stream: LogStream) -> None:
        self._stream = stream

    def collect(self) -> Iterator[Metric]:
        """Read the parts now."""
        yield CounterMetricFamily(
            "matrixinfer_log_lines_dropped", "Log lines that could not be written.", value=self._stream.dropped
        )


class TokenCacheCollector(Collector):
    """The token cache of each model."""

    def __init__(self, tokenizers: TokenizerManager) -> None:
        self._tokenizers = tokenizers

    def collect(self) -> Iterator[Metric]:
        """Read the parts now."""
        chars = CounterMetricFamily(
            "matrixinfer_token_cache_chars",
            "Characters of prompts, by whether their token ids were cached.",
            labels=["model", "result"],
        )
        size = GaugeMetricFamily(
            "matrixinfer_token_cache_bytes", "Memory of the token cache, estimated.", labels=["model"]
        )
        evicted = CounterMetricFamily(
            "matrixinfer_token_cache_evicted", "Entries dropped to stay within cacheBytes.", labels=["model"]
        )
        for model, stats in self._tokenizers.caches.items():
            chars.add_metric([model, "hit"], stats.hit_chars)
            chars.add_metric([model, "miss"], stats.miss_chars)
            size.add_metric([model], stats.bytes)
            evicted.add_metric([model], stats.evicted)
        chats = self._tokenizers.chats.memory
        yield from (
            chars,
            size,
            evicted,
            GaugeMetricFamily("matrixinfer_read_chats_bytes", "Memory of chats read lately, estimated.", value=chats),
        )


class TokenSourceCollector(Collector):
    """Where the token ids of each model come from."""

    def __init__(self, sources: Callable[[], Mapping[str, Source]]) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        """Read the parts now."""
        shown = GaugeMetricFamily(
            "matrixinfer_tokenizer_source",
            "1 for where the token ids of a model's prompts come from now.",
            labels=["model", "source"],
        )
        for model, source in self._sources().items():
            for kind in get_args(Kind):
                shown.add_metric([model, kind], float(kind == source.kind))
        yield shown


class PodCollector(Collector):
    """What is known about the pods, other than their events."""

    def __init__(self, registry: PodRegistry, loads: Mapping[str, Mapping[Outcome, int]]) -> None:
        self._registry = registry
        self._loads = loads

    def collect(self) -> Iterator[Metric]:
        """Read the parts now."""
        asleep = GaugeMetricFamily("matrixinfer_pod_asleep", "1 while the pod's engine sleeps.", labels=["pod"])
        reports = CounterMetricFamily(
            "matrixinfer_load_reports",
            "Load that engines published, by what became of it.",
            labels=["pod", "outcome"],
        )
        for pod in self._registry.pods:
            asleep.add_metric([pod.name], float(pod.asleep is not None))
        for endpoint, outcomes in list(self._loads.items()):
            for outcome in get_args(Outcome):
                reports.add_metric([endpoint, outcome], outcomes.get(outcome, 0))
        yield from (asleep, reports)


class FeedCollector(Collector):
    """The KV event feed of each endpoint."""

    def __init__(
        self, feeds: Mapping[str, PodFeed], doubts: Callable[[str], bool], reuse: Callable[[str], float]
    ) -> None:
        self._feeds = feeds
        self._doubts = doubts
        self._reuse = reuse

    def collect(self) -> Iterator[Metric]:
        """Read the parts now."""
        feeds = [(pod, feed, trust_in(feed, doubted=self._doubts(pod))) for pod, feed in list(self._feeds.items())]
        yield from _belief(feeds)
        reuse = GaugeMetricFamily(
            "matrixinfer_kv_reuse",
            "Share of the predicted hits that answers report lately, by which predictions are scaled; 1 when they agree.",
            labels=["pod"],
        )
        for pod, _, _ in feeds:
            reuse.add_metric([pod], self._reuse(pod))
        yield reuse
        yield from _ledgers(feeds)
        yield from _frames(feeds)


_Feeds: TypeAlias = Sequence[tuple[str, PodFeed, Trust]]


def _belief(feeds: _Feeds) -> Iterator[Metric]:
    """How far each feed is believed, and why."""
    state = GaugeMetricFamily(
        "matrixinfer_kv_feed_state", "1 for the current state of the endpoint's feed.", labels=["pod", "state"]
    )
    trust = GaugeMetricFamily(
        "matrixinfer_kv_trust", "1 for the current trust in the endpoint's events.", labels=["pod", "trust"]
    )
    limits = GaugeMetricFamily(
        "matrixinfer_kv_feed_limits", "1 for each limit of what the endpoint's events tell.", labels=["pod", "limit"]
    )
    for pod, feed, believed in feeds:
        for limit in sorted({name_of(words) for words in feed.limits}):
            limits.add_metric([pod, limit], 1.0)
        for each in FeedState:
            state.add_metric([pod, each.value], float(feed.state is each))
        for level in get_args(Trust):
            trust.add_metric([pod, level], float(level == believed))
    yield from (state, trust, limits)


def _ledgers(feeds: _Feeds) -> Iterator[Metric]:
    """What each ledger holds and has applied."""
    blocks = GaugeMetricFamily("matrixinfer_kv_engine_blocks", "Engine blocks known at the endpoint.", labels=["pod"])
    memory = GaugeMetricFamily(
        "matrixinfer_kv_ledger_bytes", "Memory of the endpoint's ledger, estimated.", labels=["pod"]
    )
    events = CounterMetricFamily(
        "matrixinfer_kv_blocks", "Engine blocks in events, by outcome.", labels=["pod", "outcome"]
    )
    for pod, feed, _ in feeds:
        blocks.add_metric([pod], len(feed.ledger))
        memory.add_metric([pod], feed.ledger.memory_bytes)
        for outcome in ("stored", "removed", "copies", "reported_again", "orphans", "unknown_removed", "ended"):
            events.add_metric([pod, outcome], getattr(feed.ledger.stats, outcome))
    yield from (blocks, memory, events)


def _frames(feeds: _Feeds) -> Iterator[Metric]:
    """What each feed has received."""
    frames = CounterMetricFamily(
        "matrixinfer_kv_frames", "Frames of the feed, received and by problem.", labels=["pod", "kind"]
    )
    received = CounterMetricFamily("matrixinfer_kv_received_bytes", "Payload of the feed's frames.", labels=["pod"])
    held = GaugeMetricFamily(
        "matrixinfer_kv_held_frames", "Live frames that wait for a replay to finish.", labels=["pod"]
    )
    last = GaugeMetricFamily(
        "matrixinfer_kv_last_frame_timestamp_seconds",
        "When the last live frame arrived, in Unix time.",
        labels=["pod"],
    )
    lag = GaugeMetricFamily(
        "matrixinfer_kv_lag_seconds",
        "Time from the timestamp of the last applied live batch to the arrival of the last live frame. "
        "Includes the difference between the engine's clock and this one.",
        labels=["pod"],
    )
    for pod, feed, _ in feeds:
        ledger, stats = feed.ledger.stats, feed.stats
        frames.add_metric([pod, "received"], stats.frames)
        for kind in _STATS:
            frames.add_metric([pod, kind], getattr(stats, kind))
        for kind in ("clears", "other_attention", "misfits"):
            frames.add_metric([pod, kind], getattr(ledger, kind))
        received.add_metric([pod], stats.bytes)
        held.add_metric([pod], feed.backlog)
        if stats.last_frame_at is not None:
            last.add_metric([pod], stats.last_frame_at)
            if stats.last_batch_at is not None:
                lag.add_metric([pod], stats.last_frame_at - stats.last_batch_at)
    yield from (frames, received, held, last, lag)


class PluginCollector(Collector):
    """Plugins that failed or were slow."""

    def __init__(self, scheduler: Callable[[], Scheduler]) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        """Read the parts now."""
        rejected = CounterMetricFamily(
            "matrixinfer_plugin_rejected", "Calls of a plugin that raised or broke the contract.", labels=["plugin"]
        )
        slow = CounterMetricFamily(
            "matrixinfer_plugin_slow", "Calls of a plugin that took longer than slowPluginSeconds.", labels=["plugin"]
        )
        scheduler = self._scheduler()
        for plugin, count in scheduler.rejected.items():
            rejected.add_metric([plugin], count)
        for plugin, count in scheduler.slow.items():
            slow.add_metric([plugin], count)
        yield from (rejected, slow)
