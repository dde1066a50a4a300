"""Stores what is known about every pod, and finds the pods that serve a model.

It does no I/O: the watcher and the router report their observations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from matrixinfer.config import KvEventsConfig, ModelConfig, PodConfig, PodWatchConfig
from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.errors import NoPodAvailable, UnknownModel


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMetrics:
    """One reading of an engine's metrics. A value is None if the engine does not export it."""

    running: int | None
    waiting: int | None
    cache_usage: float | None
    """Fraction of KV blocks in use, 0 to 1."""
    read_at: float
    """When the reading began, in seconds on the registry's clock."""
    prefix_hits: int | None = None
    """Prompt tokens found in the engine's cache since it started, on any tier."""
    prefix_queries: int | None = None
    """Prompt tokens looked up in the engine's cache since it started."""
    block_size: int | None = None
    """Tokens per block of the engine's cache."""
    prefix_caching: bool | None = None
    """Whether the engine reuses the blocks of earlier prompts (prefix caching)."""
    ranks: Mapping[int, RankMetrics] = field(default_factory=dict)
    """The metrics of each data-parallel rank, if the engine reports them separately."""
    started_at: float | None = None
    """When the engine's process started, in Unix seconds on its clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMetrics:
    """The fields of `EngineMetrics` for one data-parallel rank."""

    running: int | None = None
    waiting: int | None = None
    cache_usage: float | None = None
    prefix_hits: int | None = None
    prefix_queries: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A cache that can be chosen: a pod, or one of its data-parallel ranks, each of which has a separate cache."""

    name: str
    """The pod's name, or `pod@dp0`, `pod@dp1`, …; the index and the feeds use the same name."""
    pod: Pod
    rank: int | None
    """The data-parallel rank; None for the whole pod."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedNames:
    """The model names that one engine serves."""

    base_model: str
    """The engine's own name of its model, which the index uses as well."""
    aliases: frozenset[str]
    """All names of the base model, including `base_model`."""
    adapters: Mapping[str, str]
    """Maps adapter names to the model that they adapt."""
    engine: str | None = None
    """The engine's name of its kind, the owner of its models, such as `vllm` or `sglang`."""
    context_length: int | None = None
    """Maximum number of tokens of prompt and reply together; None if the engine does not report it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One entry of the gateway's `/v1/models`."""

    name: str
    parent: str | None = None
    """The model that an adapter adapts; None for base models."""


@dataclass(slots=True, kw_only=True, eq=False)
class Pod:
    """The last known state of one engine replica. Only its registry changes it."""

    config: PodConfig
    served: ServedNames | None = None
    """None until the engine has reported it."""
    kv_sources: tuple[KvEventsConfig, ...] | None = None
    """Its publishers of KV events, one per data-parallel rank; empty if it has none, None if it was not asked yet."""
    metrics: EngineMetrics | None = None
    failures: int = 0
    """Number of consecutive failures."""
    healthy: bool = False
    """False until the first answer, and after too many consecutive failures."""
    gone: bool = False
    """True once the pod has left the registry: no more requests are sent there."""
    endpoints: Sequence[Endpoint] = ()
    """The pod itself, or each data-parallel rank if it publishes events of several ranks."""

    def __post_init__(self) -> None:
        self.set_kv_sources(self.kv_sources)

    @property
    def name(self) -> str:
        """The unique name."""
        return self.config.name

    @property
    def url(self) -> str:
        """The base URL of its HTTP API."""
        return self.config.url

    @property
    def engine(self) -> str | None:
        """The engine's name of its kind; None until the engine has reported it."""
        return None if self.served is None else self.served.engine

    @property
    def base_model(self) -> str | None:
        """The engine's own name of its model; None until the engine has reported it."""
        return None if self.served is None else self.served.base_model

    def set_kv_sources(self, sources: tuple[KvEventsConfig, ...] | None) -> None:
        """Set its publishers of KV events, and its endpoints accordingly. None: not known."""
        self.kv_sources = sources
        ranks = len(sources or ())
        self.endpoints = tuple(
            Endpoint(name=str(EndpointName(self.name, rank)), pod=self, rank=rank)
            for rank in (range(ranks) if ranks > 1 else (None,))
        )

    def index_name(self, name: str) -> str | None:
        """The index's name of a model if this engine is known to serve it, else None."""
        if self.served is None:
            return None
        if name in self.served.aliases:
            return self.served.base_model
        return name if name in self.served.adapters else None


class PodRegistry:
    """All pods of the fleet; pods may join and leave.

    `clock` returns seconds, and stamps the readings of metrics. Reports about pods that have left are ignored.
    """

    def __init__(
        self,
        pods: Sequence[PodConfig],
        models: Sequence[ModelConfig],
        watch: PodWatchConfig,
        clock: Callable[[], float],
    ) -> None:
        self._by_name = {pod.name: Pod(config=pod, kv_sources=_configured_sources(pod)) for pod in pods}
        self.pods: Sequence[Pod] = tuple(self._by_name.values())
        self._watch = watch
        self.clock = clock
        self._configured = {alias: model.name for model in models for alias in (model.name, *model.aliases)}
        self._names_in_redis = {model.name: model.index_name for model in models if model.index_name is not None}

    def join(self, config: PodConfig) -> Pod:
        """Add a pod. Raises `ValueError` if a pod with that name exists."""
        if config.name in self._by_name:
            raise ValueError(f"a pod named `{config.name}` already exists")
        pod = self._by_name[config.name] = Pod(config=config, kv_sources=_configured_sources(config))
        self.pods = (*self.pods, pod)
        return pod

    def leave(self, name: str) -> Pod | None:
        """Remove a pod and return it; None if no pod has that name."""
        pod = self._by_name.pop(name, None)
        if pod is not None:
            pod.gone = True
            self.pods = tuple(self._by_name.values())
        return pod

    def has(self, pod: str, endpoint: str) -> bool:
        """Whether the pod has an endpoint with that name."""
        state = self._by_name.get(pod)
        return state is not None and any(each.name == endpoint for each in state.endpoints)

    def resolve(self, requested: str) -> tuple[str, list[Pod]]:
        """The index's name of a model, and the pods that may serve it.

        Returns only healthy pods, or as a last resort all pods if none is healthy. If no pod is known to serve a
        configured model, pods that have not reported their models yet are assumed to serve it. Raises `UnknownModel`
        if the model is not configured and all pods have reported other models; `NoPodAvailable` if no pod serves the
        model now, but one may later.
        """
        name = self._configured.get(requested, requested)
        index_name, pods = self._serving(name)
        if not pods:
            unidentified = [pod for pod in self.pods if pod.served is None]
            if requested not in self._configured:
                if not unidentified:
                    raise UnknownModel(f"The model `{requested}` does not exist.", param="model")
                raise NoPodAvailable(
                    f"No pod serves the model `{requested}`; {len(unidentified)} have not answered yet."
                )
            if not unidentified:
                raise NoPodAvailable(f"No pod serves the model `{requested}` at the moment.")
            index_name, pods = name, unidentified
        return index_name, [pod for pod in pods if pod.healthy] or pods

    def configured_name(self, model: str, pods: Sequence[Pod]) -> str:
        """The configured name of a model that `pods` serve, found by the model's own name or an alias; else its own name."""
        if model in self._configured:
            return self._configured[model]
        aliases = {
            alias for pod in pods if pod.served is not None and pod.base_model == model for alias in pod.served.aliases
        }
        return next((self._configured[alias] for alias in sorted(aliases) if alias in self._configured), model)

    def name_in_redis(self, model: str) -> str:
        """The name in Redis of a model, by the index's name of it."""
        if not self._names_in_redis:
            return model
        return self._names_in_redis.get(self.configured_name(model, self.pods), model)

    def starts(self) -> dict[str, float]:
        """When engines started, in Unix seconds by pod and by rank; engines that do not report it are absent."""
        return {
            name: pod.metrics.started_at
            for pod in self.pods
            if pod.metrics is not None and pod.metrics.started_at is not None
            for name in {pod.name, *(endpoint.name for endpoint in pod.endpoints)}
        }

    def block_sizes(self) -> set[int]:
        """The block sizes of the engines that report them."""
        return {size for pod in self.pods if pod.metrics is not None and (size := pod.metrics.block_size) is not None}

    def knows(self, name: str) -> bool:
        """Whether that is the name of a pod or of a rank."""
        return name in self._by_name or self.is_endpoint(name)

    def endpoint_names(self) -> set[str]:
        """The names of all pods and of their ranks."""
        return {name for pod in self.pods for name in (pod.name, *(endpoint.name for endpoint in pod.endpoints))}

    def models(self) -> list[ServedModel]:
        """All names for which `resolve` finds pods, sorted."""
        found: dict[str, str | None] = {}
        for pod in self.pods:
            if pod.served is not None:
                found.update(dict.fromkeys(pod.served.aliases))
                found.update(pod.served.adapters)
        unidentified = any(pod.served is None for pod in self.pods)
        for alias, name in self._configured.items():
            if name in found:
                found.setdefault(alias, found[name])
            elif unidentified:
                found.setdefault(alias, None)
        return [ServedModel(name=name, parent=found[name]) for name in sorted(found)]

    def base_models(self) -> list[str]:
        """The index's names of the models that engines have reported, without adapters."""
        return sorted({pod.base_model for pod in self.pods if pod.base_model is not None})

    def is_endpoint(self, name: str) -> bool:
        """Whether a pod, or a rank of a pod, has that name."""
        pod = self._by_name.get(name) or self._by_name.get(EndpointName.parse(name).pod)
        return pod is not None and any(endpoint.name == name for endpoint in pod.endpoints)

    def names(self) -> set[str]:
        """All model names that are served now or configured."""
        served = [pod.served for pod in self.pods if pod.served is not None]
        return set(self._configured).union(*(each.aliases for each in served), *(each.adapters for each in served))

    def any_healthy(self) -> bool:
        """Whether at least one pod is healthy."""
        return any(pod.healthy for pod in self.pods)

    def metrics_of(self, pod: Pod, now: float) -> EngineMetrics | None:
        """The pod's last metrics; None if there are none or they are too old to be useful."""
        metrics = pod.metrics
        if metrics is None or now - metrics.read_at > self._watch.stale_after_seconds:
            return None
        return metrics

    def name_at(self, pod: str, requested: str) -> str:
        """The model name to send to a pod: the requested name if the pod knows it, else the name that it is an alias of."""
        state = self._by_name.get(pod)
        if state is not None and state.index_name(requested) is not None:
            return requested
        return self._configured.get(requested, requested)

    def failed(self, pod: str) -> None:
        """Report that the pod refused or broke a connection, or did not answer in time."""
        state = self._by_name.get(pod)
        if state is None:
            return
        state.failures += 1
        if state.failures >= self._watch.unhealthy_after_failures:
            state.healthy = False

    def answered(self, pod: str) -> None:
        """Report that the pod answered with something other than a server error."""
        state = self._by_name.get(pod)
        if state is not None:
            state.failures = 0
            state.healthy = True

    def learn(
        self, pod: str, *, served: ServedNames | None = None, kv_sources: tuple[KvEventsConfig, ...] | None = None
    ) -> None:
        """Record the pod's models or publishers; None leaves the previous value."""
        state = self._by_name.get(pod)
        if state is None:
            return
        if served is not None:
            state.served = served
        if kv_sources is not None:
            state.set_kv_sources(kv_sources)

    def measured(self, pod: str, metrics: EngineMetrics) -> None:
        """Record a reading of the pod's metrics."""
        state = self._by_name.get(pod)
        if state is not None:
            state.metrics = metrics

    def _serving(self, name: str) -> tuple[str, list[Pod]]:
        """The pods known to serve a name. If engines name the same model differently, the first pod's name is used."""
        names = [(pod, pod.index_name(name)) for pod in self.pods]
        serving = [(pod, index_name) for pod, index_name in names if index_name is not None]
        return serving[0][1] if serving else name, [pod for pod, _ in serving]


def _configured_sources(pod: PodConfig) -> tuple[KvEventsConfig, ...] | None:
    if pod.kv_events == "discover":
        return None
    return () if pod.kv_events == "none" else (pod.kv_events,)
