"""Metrics that are read off the parts themselves whenever someone scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from matrixinfer.index.base import BlockIndex
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.scheduler.framework import Trust
from matrixinfer.scheduler.scheduler import Scheduler
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
        """One reading."""
        stats = self._index.stats()
        yield GaugeMetricFamily("matrixinfer_index_blocks", "Distinct blocks in the index.", value=stats.blocks)
        yield GaugeMetricFamily("matrixinfer_index_bytes", "Memory of the index, estimated.", value=stats.memory_bytes)
        yield CounterMetricFamily(
            "matrixinfer_index_evicted_blocks", "Blocks dropped to stay within maxBlocks.", value=stats.evicted
        )


class KeptCollector(Collector):
    """How much the parts keep that remember something; each has a bound of its own."""

    def __init__(self, parts: Mapping[str, Callable[[], int]]) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        """One reading."""
        kept = GaugeMetricFamily("matrixinfer_kept_entries", "What a part remembers, in entries.", labels=["part"])
        for part, count in self._parts.items():
            kept.add_metric([part], count())
        yield kept


class TokenCacheCollector(Collector):
    """What each model's tokenizer remembers."""

    def __init__(self, tokenizers: TokenizerManager) -> None:
        self._tokenizers = tokenizers

    def collect(self) -> Iterator[Metric]:
        """One reading."""
        chars = CounterMetricFamily(
            "matrixinfer_token_cache_chars",
            "Characters of prompts, by whether their ids were remembered.",
            labels=["model", "result"],
        )
        size = GaugeMetricFamily("matrixinfer_token_cache_bytes", "Memory of it, estimated.", labels=["model"])
        evicted = CounterMetricFamily(
            "matrixinfer_token_cache_evicted", "Entries dropped to stay within cacheBytes.", labels=["model"]
        )
        for model, stats in self._tokenizers.caches.items():
            chars.add_metric([model, "hit"], stats.hit_chars)
            chars.add_metric([model, "miss"], stats.miss_chars)
            size.add_metric([model], stats.bytes)
            evicted.add_metric([model], stats.evicted)
        yield from (chars, size, evicted)


class FeedCollector(Collector):
    """What each pod's KV events brought."""

    def __init__(self, feeds: Mapping[str, PodFeed], doubts: Callable[[str], bool]) -> None:
        self._feeds = feeds
        self._doubts = doubts

    def collect(self) -> Iterator[Metric]:
        """One reading."""
        state = GaugeMetricFamily(
            "matrixinfer_kv_feed_state", "1 for the state that the pod's feed is in.", labels=["pod", "state"]
        )
        trust = GaugeMetricFamily(
            "matrixinfer_kv_trust", "1 for how far the pod's events are believed.", labels=["pod", "trust"]
        )
        blocks = GaugeMetricFamily("matrixinfer_kv_engine_blocks", "Engine blocks known at the pod.", labels=["pod"])
        memory = GaugeMetricFamily(
            "matrixinfer_kv_ledger_bytes", "Memory of what is known of the pod's blocks, estimated.", labels=["pod"]
        )
        events = CounterMetricFamily(
            "matrixinfer_kv_blocks", "Engine blocks in events, by what became of them.", labels=["pod", "outcome"]
        )
        frames = CounterMetricFamily(
            "matrixinfer_kv_frames", "Frames of the feed, and what was wrong with them.", labels=["pod", "kind"]
        )
        received = CounterMetricFamily("matrixinfer_kv_received_bytes", "Payload of the feed's frames.", labels=["pod"])
        held = GaugeMetricFamily(
            "matrixinfer_kv_held_frames", "Live frames that wait for a replay to be applied.", labels=["pod"]
        )
        last = GaugeMetricFamily(
            "matrixinfer_kv_last_frame_timestamp_seconds", "When the last live frame came.", labels=["pod"]
        )
        lag = GaugeMetricFamily(
            "matrixinfer_kv_lag_seconds",
            "From the timestamp of the last live batch applied to when the last live frame came. "
            "Includes what the engine's clock and this one differ by.",
            labels=["pod"],
        )
        for pod, feed in list(self._feeds.items()):
            for each in FeedState:
                state.add_metric([pod, each.value], float(feed.state is each))
            believed = trust_in(feed, doubted=self._doubts(pod))
            for level in get_args(Trust):
                trust.add_metric([pod, level], float(level == believed))
            blocks.add_metric([pod], len(feed.ledger))
            memory.add_metric([pod], feed.ledger.memory_bytes)
            ledger, stats = feed.ledger.stats, feed.stats
            for outcome in ("stored", "removed", "copies", "reported_again", "orphans", "unknown_removed", "ended"):
                events.add_metric([pod, outcome], getattr(ledger, outcome))
            received.add_metric([pod], stats.bytes)
            held.add_metric([pod], feed.backlog)
            if stats.last_frame_at is not None:
                last.add_metric([pod], stats.last_frame_at)
                if stats.last_batch_at is not None:
                    lag.add_metric([pod], stats.last_frame_at - stats.last_batch_at)
            frames.add_metric([pod, "received"], stats.frames)
            for kind in _STATS:
                frames.add_metric([pod, kind], getattr(stats, kind))
            for kind in ("clears", "other_attention", "misfits"):
                frames.add_metric([pod, kind], getattr(ledger, kind))
        yield from (state, trust, blocks, memory, events, frames, received, held, last, lag)


class PluginCollector(Collector):
    """Plugins that raised or broke the contract."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        """One reading."""
        rejected = CounterMetricFamily(
            "matrixinfer_plugin_rejected", "Times that a plugin was left out of a decision.", labels=["plugin"]
        )
        for plugin, count in self._scheduler.rejected.items():
            rejected.add_metric([plugin], count)
        yield rejected
