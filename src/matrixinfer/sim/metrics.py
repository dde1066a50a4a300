"""`/metrics`, with vLLM's names."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from matrixinfer.sim.api import Exchange
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.rank import EngineRank
from matrixinfer.sim.stats import EngineStats

_LABELS = ("engine", "model_name")
_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:num_requests_running": ("Requests in model execution batches.", lambda stats: stats.running),
    "vllm:num_requests_waiting": ("Requests waiting to be processed.", lambda stats: stats.waiting),
    "vllm:kv_cache_usage_perc": ("KV cache usage, 1 means 100 percent.", lambda stats: stats.cache_usage),
}
_TOTALS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda stats: stats.prefix_queries),
    "vllm:prefix_cache_hits": ("Prompt tokens found in the prefix cache.", lambda stats: stats.prefix_hits),
    "vllm:external_prefix_cache_hits": ("Prompt tokens loaded from the CPU tier.", lambda stats: stats.loaded_tokens),
    "vllm:prompt_tokens": ("Prompt tokens processed.", lambda stats: stats.prompt_tokens),
    "vllm:generation_tokens": ("Tokens generated.", lambda stats: stats.generated_tokens),
    "vllm:num_preemptions": ("Requests pushed out of the cache while running.", lambda stats: stats.preemptions),
}
_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)


class Metrics(Protocol):
    """What the handlers record, and `/metrics` shows."""

    def first_token(self, rank: EngineRank, seconds: float) -> None:
        """Record the time from a request's arrival to its first token."""
        ...

    def adapter(self, name: str | None) -> AbstractContextManager[None]:
        """While its context is open, a request runs that uses this adapter."""
        ...

    def finished(self, exchange: Exchange, cached_tokens: int, *, streamed: bool) -> None:
        """Record a request's end."""
        ...

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        ...


class EngineMetrics:
    """Reads the ranks' models when scraped. Only times to first token are recorded when they happen."""

    def __init__(self, config: SimEngineConfig, ranks: Sequence[EngineRank]) -> None:
        self._config = config
        self._ranks = ranks
        self._started_at = time.time()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "Time to first token in seconds.",
            labelnames=_LABELS,
            buckets=_TTFT_BUCKETS,
            registry=self._registry,
        )
        self._running_adapters: Counter[str] = Counter()
        self._adapters = Gauge(
            "vllm:lora_requests_info",
            "Running stats on lora requests.",
            labelnames=("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
            registry=self._registry,
        )
        for rank in ranks:
            self._first_token.labels(*self._labels(rank))

    def first_token(self, rank: EngineRank, seconds: float) -> None:
        """Record the time from a request's arrival to its first token."""
        self._first_token.labels(*self._labels(rank)).observe(seconds)

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """A request that uses this adapter runs. Each state gets a series whose value is when it was last so."""
        if name is None:
            yield
            return
        self._running_adapters[name] += 1
        self._note_adapters()
        try:
            yield
        finally:
            self._running_adapters[name] -= 1
            self._note_adapters()

    def _note_adapters(self) -> None:
        running = ",".join(sorted(name for name, count in self._running_adapters.items() if count))
        self._adapters.labels(str(self._config.max_loras), "", running).set_to_current_time()

    def finished(self, exchange: Exchange, cached_tokens: int, *, streamed: bool) -> None:
        """Record a request's end. vLLM's totals are those of the ranks."""

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Read the models. Called by the registry."""
        stats = [(self._labels(rank), rank.stats) for rank in self._ranks]
        for kind, metrics in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _TOTALS)):
            for name, (text, read) in metrics.items():
                family = kind(name, text, labels=_LABELS)
                for labels, values in stats:
                    family.add_metric(labels, read(values))
                yield family
        yield self._cache_config()
        yield GaugeMetricFamily(
            "process_start_time_seconds",
            "Start time of the process since unix epoch in seconds.",
            value=self._started_at,
        )

    def _labels(self, rank: EngineRank) -> tuple[str, str]:
        return str(rank.number), self._config.names[0]

    def _cache_config(self) -> Metric:
        labels = {
            "block_size": str(self._config.block_size),
            "enable_prefix_caching": str(self._config.prefix_caching),
            "num_gpu_blocks": str(self._config.num_blocks),
        }
        info = GaugeMetricFamily("vllm:cache_config_info", "Information of the cache.", labels=("engine", *labels))
        for rank in self._ranks:
            info.add_metric((str(rank.number), *labels.values()), 1)
        return info
