"""`/metrics` under vLLM's names."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.driver import EngineDriver

_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)


class EngineMetrics:
    """Reads the model when scraped; only times to first token are recorded as they happen."""

    def __init__(self, config: SimEngineConfig, driver: EngineDriver) -> None:
        self._config = config
        self._driver = driver
        self._labels = {"engine": "0", "model_name": config.names[0]}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "Time to first token in seconds.",
            labelnames=tuple(self._labels),
            buckets=_TTFT_BUCKETS,
            registry=self._registry,
        ).labels(**self._labels)

    def first_token(self, seconds: float) -> None:
        """Record that a request got its first token this long after it came."""
        self._first_token.observe(seconds)

    def render(self) -> bytes:
        """Write the exposition text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Read the model; the registry calls this."""
        stats = self._driver.model.stats
        gauges = {
            "vllm:num_requests_running": ("Requests in model execution batches.", stats.running),
            "vllm:num_requests_waiting": ("Requests waiting to be processed.", stats.waiting),
            "vllm:kv_cache_usage_perc": ("KV cache usage, 1 means 100 percent.", stats.cache_usage),
        }
        totals = {
            "vllm:prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            "vllm:prefix_cache_hits": ("Prompt tokens found in the prefix cache.", stats.prefix_hits),
            "vllm:prompt_tokens": ("Prompt tokens processed.", stats.prompt_tokens),
            "vllm:generation_tokens": ("Tokens generated.", stats.generated_tokens),
            "vllm:num_preemptions": ("Requests pushed out of the cache while running.", stats.preemptions),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=tuple(self._labels))
            gauge.add_metric(tuple(self._labels.values()), value)
            yield gauge
        for name, (text, value) in totals.items():
            counter = CounterMetricFamily(name, text, labels=tuple(self._labels))
            counter.add_metric(tuple(self._labels.values()), value)
            yield counter
        yield self._cache_config()

    def _cache_config(self) -> Metric:
        labels = {
            "block_size": str(self._config.block_size),
            "enable_prefix_caching": "True",
            "engine": "0",
            "num_gpu_blocks": str(self._config.num_blocks),
        }
        info = GaugeMetricFamily("vllm:cache_config_info", "Information of the cache.", labels=tuple(labels))
        info.add_metric(tuple(labels.values()), 1)
        return info
