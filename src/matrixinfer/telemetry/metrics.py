"""The gateway's Prometheus metrics, all under `matrixinfer_`.

Every label comes from a bounded set: pods and models that exist, stages, kinds and status codes.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.registry import Collector

M = TypeVar("M", Counter, Gauge, Histogram)

UNKNOWN_MODEL = "unknown"
"""Model label of requests whose model was not found, whatever name they gave."""

_REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_DECISION_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class _Children(dict[tuple[str, ...], M], Generic[M]):
    """A metric's children by label values. Kept here because `labels()` costs more than the observation itself."""

    def __init__(self, metric: M) -> None:
        super().__init__()
        self._metric: M = metric

    def __missing__(self, labels: tuple[str, ...]) -> M:
        child = self[labels] = self._metric.labels(*labels)
        return child

    def forget(self, first: str) -> None:
        """Drop the children whose first label is `first`."""
        for labels in [labels for labels in self if labels[0] == first]:
            del self[labels]
            self._metric.remove(*labels)


class Metrics:
    """Counters and histograms of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests answered; 499: the client went away.", "model", "code")
        self._duration = self._histogram("request_duration_seconds", "From request to end of response.")
        self._first_byte = self._histogram("time_to_first_byte_seconds", "From request to first byte of the response.")
        self._in_flight = _Children(
            Gauge("matrixinfer_in_flight", "Requests at a pod now.", ["pod"], registry=self.registry)
        )
        self._retries = self._counter("retries", "Requests sent again before their first byte.", "reason")
        self._upstream_errors = self._counter("upstream_errors", "Requests that a pod did not answer.", "pod", "kind")
        self._decision = self._histogram("decision_seconds", "Time to choose a pod.", buckets=_DECISION_BUCKETS)
        self._stages = _Children(
            self._histogram(
                "decision_stage_seconds", "Time of one stage of the decision.", "stage", buckets=_DECISION_BUCKETS
            )
        )
        self._routed = self._counter("routed", "Requests for which a pod was chosen.", "pod")
        self._degraded = self._counter("degraded", "Decisions that had to do without something.", "reason")
        self._parity = self._counter(
            "tokenizer_parity", "Comparisons of our token ids with the engine's.", "model", "check", "result"
        )
        self._approximate = _Children(
            Gauge(
                "matrixinfer_tokenizer_approximate",
                "1 while a model is routed without the index, as its token ids differ from the engine's.",
                ["model"],
                registry=self.registry,
            )
        )
        self._drift = self._counter(
            "drift", "Answers that tell of cached tokens, against what the index said.", "pod", "result"
        )
        self._reported = self._counter(
            "drift_reported_tokens", "Prompt tokens that engines found in their caches.", "pod"
        )
        self._expected = self._counter("drift_predicted_tokens", "What the index said of the same prompts.", "pod")
        self._windows = self._counter(
            "drift_windows", "Growths of engines' own counts of hits, against what the index said.", "pod", "result"
        )
        self._resyncs = self._counter("kv_resyncs", "Times that a pod was indexed anew because of drift.", "pod")
        self._prompt_tokens = self._plain_counter("prompt_tokens", "Tokens of tokenized prompts.")
        self._predicted = self._plain_counter("predicted_hit_tokens", "Of those, tokens expected in the pod's cache.")
        self._of_pods: tuple[_Children[Counter] | _Children[Gauge], ...] = (
            self._in_flight,
            self._upstream_errors,
            self._routed,
            self._drift,
            self._reported,
            self._expected,
            self._windows,
            self._resyncs,
        )
        self._of_models: tuple[_Children[Counter] | _Children[Gauge], ...] = (
            self._requests,
            self._parity,
            self._approximate,
        )

    def register(self, collector: Collector) -> None:
        """Add a collector whose metrics are exposed with these."""
        self.registry.register(collector)

    def render(self) -> bytes:
        """The exposition text, in the format that `prometheus_client.CONTENT_TYPE_LATEST` names."""
        return generate_latest(self.registry)

    def request(self, model: str | None, code: int, seconds: float) -> None:
        """A request ended. `model` is None unless it was found."""
        self._requests[model or UNKNOWN_MODEL, str(code)].inc()
        self._duration.observe(seconds)

    def first_byte(self, seconds: float) -> None:
        """The first byte of a response came, `seconds` after its request."""
        self._first_byte.observe(seconds)

    def forget_pod(self, pod: str) -> None:
        """Drop every series of a pod, which is gone."""
        for children in self._of_pods:
            children.forget(pod)

    def keep_models(self, models: Container[str]) -> None:
        """Drop every series of models that are not among these."""
        for children in self._of_models:
            for model in {labels[0] for labels in children}:
                if model not in models and model != UNKNOWN_MODEL:
                    children.forget(model)

    def at(self, pod: str) -> AbstractContextManager[None]:
        """A request is at a pod within this context. Of a pod that is gone at its end nothing is counted."""
        return self._in_flight[pod,].track_inprogress()

    def retry(self, reason: str) -> None:
        """A request is sent again."""
        self._retries[reason,].inc()

    def upstream_error(self, pod: str, kind: str) -> None:
        """A pod did not answer a request, or not to its end."""
        self._upstream_errors[pod, kind].inc()

    def decided(self, pod: str, seconds: float, stages_ms: Mapping[str, float]) -> None:
        """A pod was chosen; `stages_ms` are the milliseconds of each stage."""
        self._routed[pod,].inc()
        self._decision.observe(seconds)
        for stage, milliseconds in stages_ms.items():
            self._stages[stage,].observe(milliseconds / 1000)

    def degraded(self, reason: str) -> None:
        """A decision had to do without something."""
        self._degraded[reason,].inc()

    def predicted(self, prompt_tokens: int, hit_tokens: int) -> None:
        """A prompt was tokenized, and this much of it is expected in the chosen pod's cache."""
        self._prompt_tokens.inc(prompt_tokens)
        self._predicted.inc(hit_tokens)

    def parity(self, model: str, check: str, result: str) -> None:
        """Our token ids were compared with the engine's: `agreed`, `mismatch` or `inconclusive`."""
        self._parity[model, check, result].inc()

    def drift(self, pod: str, result: str, predicted: int, cached: int) -> None:
        """An answer told of cached tokens: `exact`, `more`, `fewer`, or fewer as some were `evicted` meanwhile."""
        self._drift[pod, result].inc()
        self._reported[pod,].inc(cached)
        self._expected[pod,].inc(predicted)

    def drift_window(self, pod: str, result: str) -> None:
        """An engine's own count has grown by what was foretold at least (`covered`), by less (`short`), or not yet."""
        self._windows[pod, result].inc()

    def resynced(self, pod: str) -> None:
        """What is indexed of a pod is cleared."""
        self._resyncs[pod,].inc()

    def approximate(self, model: str, is_approximate: bool) -> None:
        """A model is routed without the index from now on, or with it again."""
        self._approximate[model,].set(is_approximate)

    def _counter(self, name: str, text: str, *labels: str) -> _Children[Counter]:
        return _Children(Counter(f"matrixinfer_{name}", text, labels, registry=self.registry))

    def _plain_counter(self, name: str, text: str) -> Counter:
        return Counter(f"matrixinfer_{name}", text, registry=self.registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _REQUEST_BUCKETS
    ) -> Histogram:
        return Histogram(f"matrixinfer_{name}", text, labels, buckets=buckets, registry=self.registry)
