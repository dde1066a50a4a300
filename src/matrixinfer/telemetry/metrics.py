"""The gateway's Prometheus metrics, all under `matrixinfer_`.

The values of every label are bounded: they are pods and models that exist, stages, kinds and status codes.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.registry import Collector

from matrixinfer.telemetry.access_metrics import AccessMetrics
from matrixinfer.telemetry.children import Children

UNKNOWN_MODEL = "unknown"
"""Label of requests whose model was not found, whatever name they gave."""

_REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_DECISION_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters, gauges and histograms of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter(
            "requests", "Requests answered, by status code; 499 if the client disconnected.", "model", "code"
        )
        self._duration = self._histogram(
            "request_duration_seconds", "Time from the request to the end of its response."
        )
        self._first_byte = self._histogram(
            "time_to_first_byte_seconds", "Time from the request to the first byte of its response."
        )
        self._in_flight = Children(
            Gauge("matrixinfer_in_flight", "Requests in flight at a pod.", ["pod"], registry=self.registry)
        )
        self._retries = self._counter("retries", "Requests sent to another pod before their first byte.", "reason")
        self._upstream_errors = self._counter(
            "upstream_errors", "Requests that a pod did not answer, or not completely.", "pod", "kind"
        )
        self._shortages = self._counter(
            "shortages",
            "Connections not made because this process or its machine had no free file descriptor, port or memory.",
            "place",
        )
        self._ejections = self._counter("ejections", "Times that an endpoint was ejected.", "pod")
        self._ejected = Children(
            Gauge(
                "matrixinfer_ejected",
                "1 while an endpoint gets no requests, or only a probe, because it failed requests.",
                ["pod"],
                registry=self.registry,
            )
        )
        self._decision = self._histogram(
            "decision_seconds", "Time that it took to choose a pod.", buckets=_DECISION_BUCKETS
        )
        self._stages = Children(
            self._histogram(
                "decision_stage_seconds",
                "Time that one stage of the decision took.",
                "stage",
                buckets=_DECISION_BUCKETS,
            )
        )
        self._engine_tokenize = self._histogram(
            "engine_tokenize_seconds",
            "Time that an engine's /tokenize took for one prompt.",
            buckets=_DECISION_BUCKETS,
        )
        self._routed = self._counter("routed", "Requests for which a pod was chosen.", "pod")
        self._ids_sent = self._counter(
            "token_ids_sent", "Requests sent to a pod with the token ids of their prompt.", "pod"
        )
        self._ids_probes = self._counter(
            "token_ids_probes",
            "Questions to engines whether they make the same answer from token ids, by what was found.",
            "result",
        )
        self._routes = self._counter("route_requests", "Requests that took a route, by its target.", "route", "target")
        self._degraded = self._counter("degraded", "Decisions that were made without an input, by reason.", "reason")
        self._parity = self._counter(
            "tokenizer_parity",
            "Comparisons of the gateway's token ids with the engine's.",
            "model",
            "class",
            "check",
            "result",
        )
        self._approximate = Children(
            Gauge(
                "matrixinfer_tokenizer_approximate",
                "1 while a class of a model's requests is routed without the index because its token ids differ.",
                ["model", "class"],
                registry=self.registry,
            )
        )
        self._drift = self._counter(
            "drift",
            "Responses that report cached tokens, by how the report compares with the predicted hit.",
            "pod",
            "result",
        )
        self._reported_tokens = self._counter(
            "drift_reported_tokens",
            "Prompt tokens that engines reported as cached, in responses counted by drift.",
            "pod",
        )
        self._predicted_tokens = self._counter(
            "drift_predicted_tokens", "Prompt tokens that were predicted to be cached, in the same responses.", "pod"
        )
        self._windows = self._counter(
            "drift_windows",
            "Increases of engines' own hit counters, by how they compare with the predicted hits.",
            "pod",
            "result",
        )
        self._resyncs = self._counter("kv_resyncs", "Times that a pod was indexed again because of drift.", "pod")
        self._prompt_tokens = self._plain_counter("prompt_tokens", "Tokens of all tokenized prompts.")
        self._predicted_hits = self._plain_counter(
            "predicted_hit_tokens", "Prompt tokens that were predicted to be in the chosen pod's cache."
        )
        self.access = AccessMetrics(self.registry)
        self._of_pods: tuple[Children[Counter] | Children[Gauge], ...] = (
            self._in_flight,
            self._upstream_errors,
            self._ejections,
            self._ejected,
            self._routed,
            self._ids_sent,
            self._drift,
            self._reported_tokens,
            self._predicted_tokens,
            self._windows,
            self._resyncs,
        )
        self._of_models: tuple[Children[Counter] | Children[Gauge], ...] = (
            self._requests,
            self._parity,
            self._approximate,
        )

    def register(self, collector: Collector) -> None:
        """Add a collector, whose metrics are exposed together with these."""
        self.registry.register(collector)

    def render(self) -> bytes:
        """The exposition text, in the format of `prometheus_client.CONTENT_TYPE_LATEST`."""
        return generate_latest(self.registry)

    def request(self, model: str | None, code: int, seconds: float) -> None:
        """A request ended. `model` is None if it was not found."""
        self._requests[model or UNKNOWN_MODEL, str(code)].inc()
        self._duration.observe(seconds)

    def first_byte(self, seconds: float) -> None:
        """The first byte of a response arrived, `seconds` after its request."""
        self._first_byte.observe(seconds)

    def route_taken(self, route: str, target: str) -> None:
        """A request took a route, and got this target of it."""
        self._routes[route, target].inc()

    def forget_pod(self, pod: str) -> None:
        """Drop every series of a pod that has gone."""
        for children in self._of_pods:
            children.forget(pod)

    def keep_models(self, models: Container[str]) -> None:
        """Drop every series of models that are not among these."""
        for children in self._of_models:
            for model in {labels[0] for labels in children}:
                if model not in models and model != UNKNOWN_MODEL:
                    children.forget(model)

    def at(self, pod: str) -> AbstractContextManager[None]:
        """A request is in flight at a pod within this context. If the pod has gone by its end, nothing is counted."""
        return self._in_flight[pod,].track_inprogress()

    def retry(self, reason: str) -> None:
        """A request is sent to another pod."""
        self._retries[reason,].inc()

    def upstream_error(self, pod: str, kind: str) -> None:
        """A pod did not answer a request, or not completely."""
        self._upstream_errors[pod, kind].inc()

    def shortage(self, place: str) -> None:
        """A connection was not made, and not because of the other side. `place` is what it was for."""
        self._shortages[place,].inc()

    def ejected(self, pod: str) -> None:
        """An endpoint gets no requests from now on."""
        self._ejections[pod,].inc()
        self._ejected[pod,].set(1)

    def readmitted(self, pod: str) -> None:
        """An ejected endpoint gets requests again."""
        self._ejected[pod,].set(0)

    def decided(self, pod: str, seconds: float, stages_ms: Mapping[str, float]) -> None:
        """A pod was chosen; `stages_ms` has the milliseconds of each stage."""
        self._routed[pod,].inc()
        self._decision.observe(seconds)
        for stage, milliseconds in stages_ms.items():
            self._stages[stage,].observe(milliseconds / 1000)

    def token_ids_sent(self, pod: str) -> None:
        """A request goes to a pod with the token ids of its prompt."""
        self._ids_sent[pod,].inc()

    def token_ids_probed(self, result: str) -> None:
        """An engine was asked whether it makes the same answer from token ids."""
        self._ids_probes[result,].inc()

    def engine_tokenized(self, _: str, seconds: float) -> None:
        """An engine has tokenized a prompt."""
        self._engine_tokenize.observe(seconds)

    def degraded(self, reason: str) -> None:
        """A decision was made without an input."""
        self._degraded[reason,].inc()

    def predicted(self, prompt_tokens: int, hit_tokens: int) -> None:
        """A prompt was tokenized, and `hit_tokens` of it are predicted to be in the chosen pod's cache."""
        self._prompt_tokens.inc(prompt_tokens)
        self._predicted_hits.inc(hit_tokens)

    def parity(self, model: str, request_class: str, check: str, result: str) -> None:
        """Token ids were compared with the engine's. `result` is `agreed`, `mismatch` or `inconclusive`."""
        self._parity[model, request_class, check, result].inc()

    def drift(self, pod: str, result: str, predicted: int, cached: int) -> None:
        """A response reported cached tokens.

        `result` is `exact`, `more`, `fewer`, or `evicted`: fewer, but some were evicted in the meantime.
        """
        self._drift[pod, result].inc()
        self._reported_tokens[pod,].inc(cached)
        self._predicted_tokens[pod,].inc(predicted)

    def drift_window(self, pod: str, result: str) -> None:
        """An engine's own hit counter rose by at least the predicted hits (`covered`), by less (`short`), or not yet."""
        self._windows[pod, result].inc()

    def resynced(self, pod: str) -> None:
        """A pod is indexed again from the start."""
        self._resyncs[pod,].inc()

    def approximate(self, model: str, request_class: str, is_approximate: bool) -> None:
        """From now on, a class of a model's requests is routed without the index, or with it again."""
        self._approximate[model, request_class].set(is_approximate)

    def _counter(self, name: str, text: str, *labels: str) -> Children[Counter]:
        return Children(Counter(f"matrixinfer_{name}", text, labels, registry=self.registry))

    def _plain_counter(self, name: str, text: str) -> Counter:
        return Counter(f"matrixinfer_{name}", text, registry=self.registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _REQUEST_BUCKETS
    ) -> Histogram:
        return Histogram(f"matrixinfer_{name}", text, labels, buckets=buckets, registry=self.registry)
