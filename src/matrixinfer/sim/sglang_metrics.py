"""`/metrics`, with SGLang's names and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from matrixinfer.sim.api import Exchange
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.rank import EngineRank
from matrixinfer.sim.stats import EngineStats

_LABELS = ("model_name", "engine_type")
_GAUGES: dict[str, tuple[str, Callable[[EngineStats, SimEngineConfig], float]]] = {
    "sglang:num_running_reqs": ("The number of running requests.", lambda stats, _: stats.running),
    "sglang:num_queue_reqs": ("The number of requests in the waiting queue.", lambda stats, _: stats.waiting),
    "sglang:token_usage": ("The token usage.", lambda stats, _: stats.cache_usage),
    "sglang:num_used_tokens": ("The number of used tokens.", lambda stats, _: stats.used_tokens),
    "sglang:cache_hit_rate": (
        "The prefix cache hit rate.",
        lambda stats, _: stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0,
    ),
    "sglang:max_total_num_tokens": ("Maximum tokens in the KV cache.", lambda _, config: config.cache_tokens),
    "sglang:page_size": ("KV cache page size in tokens.", lambda _, config: config.block_size),
    "sglang:num_pages": ("Number of KV cache pages.", lambda _, config: config.num_blocks - 1),
    "sglang:context_len": ("Maximum context length.", lambda _, config: config.context_length),
}
_TTFT_BUCKETS = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)


class SglangMetrics:
    """Gauges of each rank are read when scraped. Counters are of all ranks together, and count finished requests."""

    def __init__(self, config: SimEngineConfig, ranks: Sequence[EngineRank]) -> None:
        self._config = config
        self._ranks = ranks
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._shared = config.names[0], "unified"
        self._first_token = Histogram(
            "sglang:time_to_first_token_seconds",
            "Histogram of time to first token in seconds.",
            labelnames=_LABELS,
            buckets=_TTFT_BUCKETS,
            registry=self._registry,
        )
        self._first_token.labels(*self._shared)
        self._prompt = self._counter("sglang:prompt_tokens", "Number of prefill tokens processed.", "is_streaming")
        self._reply = self._counter(
            "sglang:generation_tokens", "Number of generation tokens processed.", "is_streaming"
        )
        self._requests = self._counter("sglang:num_requests", "Number of requests processed.", "is_streaming")
        self._cached = self._counter(
            "sglang:cached_tokens", "Number of cached prompt tokens by source.", "cache_source"
        )

    def first_token(self, _rank: EngineRank, seconds: float) -> None:
        """Record the time from a request's arrival to its first token."""
        self._first_token.labels(*self._shared).observe(seconds)

    def adapter(self, name: str | None) -> AbstractContextManager[None]:
        """SGLang does not say which adapters run."""
        return nullcontext()

    def finished(self, exchange: Exchange, cached_tokens: int, *, streamed: bool) -> None:
        """Record a request's end."""
        kind = str(streamed)
        self._prompt.labels(*self._shared, kind).inc(exchange.prompt_tokens)
        self._reply.labels(*self._shared, kind).inc(exchange.generated)
        self._requests.labels(*self._shared, kind).inc()
        if cached_tokens:
            self._cached.labels(*self._shared, "device").inc(cached_tokens)

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Read the models. Called by the registry."""
        several = len(self._ranks) > 1
        names = (*_LABELS, "tp_rank", "pp_rank", "moe_ep_rank", *(["dp_rank"] if several else []))
        for name, (text, read) in _GAUGES.items():
            family = GaugeMetricFamily(name, text, labels=names)
            for rank in self._ranks:
                own = [str(rank.number)] if several else []
                family.add_metric([*self._shared, "0", "0", "0", *own], read(rank.stats, self._config))
            yield family

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, text, labelnames=(*_LABELS, label), registry=self._registry)
