"""What is known about every pod, and which pods serve a model. No I/O: the watcher and the router report what they saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from matrixinfer.config import KvEventsConfig, ModelConfig, PodConfig, PodWatchConfig
from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.errors import NoPodAvailable, UnknownModel


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMetrics:
    """One reading of an engine's metrics. None: the engine does not export that one."""

    running: int | None
    waiting: int | None
    cache_usage: float | None
    """Share of KV blocks in use, 0 to 1."""
    read_at: float
    """Seconds on the registry's clock, when the reading began."""
    prefix_hits: int | None = None
    """Prompt tokens that the engine has found in its cache since it started, on whatever tier."""
    prefix_queries: int | None = None
    """Prompt tokens that it has looked up there."""
    block_size: int | None = None
    """Tokens per block of its cache."""
    prefix_caching: bool | None = None
    """Whether it keeps the blocks of prompts for those that begin alike."""
    ranks: Mapping[int, RankMetrics] = field(default_factory=dict)
    """The same of each data-parallel rank, where the engine tells them apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMetrics:
    """What `EngineMetrics` has of one data-parallel rank."""

    running: int | None = None
    waiting: int | None = None
    cache_usage: float | None = None
    prefix_hits: int | None = None
    prefix_queries: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a request can go: a pod, or one data-parallel rank of it, each of which is a cache of its own."""

    name: str
    """The pod's, or `pod@dp0`, `pod@dp1`, …; so the index and the feeds name it, too."""
    pod: Pod
    rank: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedNames:
    """The names that one engine answers to."""

    base_model: str
    """The engine's own name of its model, which is the index's name as well."""
    aliases: frozenset[str]
    """Every name of the base model, itself included."""
    adapters: Mapping[str, str]
    """Adapter name to the model below it."""
    engine: str | None = None
    """What the engine calls itself as the owner of its models, such as `vllm` or `sglang`."""
    context_length: int | None = None
    """Most tokens of prompt and reply together; None where it does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One entry of the gateway's `/v1/models`."""

    name: str
    parent: str | None = None
    """The model below an adapter; None for base models."""


@dataclass(slots=True, kw_only=True, eq=False)
class Pod:
    """One engine replica as last seen. Only its registry changes it."""

    config: PodConfig
    served: ServedNames | None = None
    """None until the engine told."""
    kv_sources: tuple[KvEventsConfig, ...] | None = None
    """Where it publishes KV events, one per data-parallel rank; empty: nowhere; None: not asked yet."""
    metrics: EngineMetrics | None = None
    failures: int = 0
    """Failures in a row."""
    healthy: bool = False
    """False until it answered once, and after too many failures in a row."""
    gone: bool = False
    """It has left: nothing is sent there any more."""
    endpoints: Sequence[Endpoint] = ()
    """Itself, or each of its data-parallel ranks where it publishes the events of several."""

    def __post_init__(self) -> None:
        self.publishes(self.kv_sources)

    @property
    def name(self) -> str:
        """Unique name."""
        return self.config.name

    @property
    def url(self) -> str:
        """Base URL of its HTTP API."""
        return self.config.url

    @property
    def engine(self) -> str | None:
        """What it calls itself; None until it told."""
        return None if self.served is None else self.served.engine

    @property
    def base_model(self) -> str | None:
        """The engine's own name of its model; None until it told."""
        return None if self.served is None else self.served.base_model

    def publishes(self, sources: tuple[KvEventsConfig, ...] | None) -> None:
        """Where it publishes KV events is known, or not any more."""
        self.kv_sources = sources
        ranks = len(sources or ())
        self.endpoints = tuple(
            Endpoint(name=str(EndpointName(self.name, rank)), pod=self, rank=rank)
            for rank in (range(ranks) if ranks > 1 else (None,))
        )

    def index_name(self, name: str) -> str | None:
        """The index's name of a model that this engine is known to serve, else None."""
        if self.served is None:
            return None
        if name in self.served.aliases:
            return self.served.base_model
        return name if name in self.served.adapters else None


class PodRegistry:
    """Every pod of the fleet, which may come and go. Whoever reads metrics stamps them with `clock`, in seconds.

    What is reported of pods that have left says nothing any more.
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

    def join(self, config: PodConfig) -> Pod:
        """A pod comes, under a name that no other has. Raises `ValueError` where one has."""
        if config.name in self._by_name:
            raise ValueError(f"there is a pod `{config.name}` already")
        pod = self._by_name[config.name] = Pod(config=config, kv_sources=_configured_sources(config))
        self.pods = (*self.pods, pod)
        return pod

    def leave(self, name: str) -> Pod | None:
        """A pod goes; None where there is none of that name."""
        pod = self._by_name.pop(name, None)
        if pod is not None:
            pod.gone = True
            self.pods = tuple(self._by_name.values())
        return pod

    def has(self, pod: str, endpoint: str) -> bool:
        """Whether `endpoint` is one of the pod's."""
        state = self._by_name.get(pod)
        return state is not None and any(each.name == endpoint for each in state.endpoints)

    def resolve(self, requested: str) -> tuple[str, list[Pod]]:
        """The index's name of a model and the pods that may serve it.

        Only healthy pods, unless none is: then all, as a last resort. Pods that have not told what they serve are
        taken for a configured model that no other pod serves. Raises `UnknownModel` when every pod has told, none
        serves the name and no configuration knows it; `NoPodAvailable` when a pod may yet turn out to serve it.
        """
        name = self._configured.get(requested, requested)
        index_name, pods = self._serving(name)
        if not pods:
            untold = [pod for pod in self.pods if pod.served is None]
            if requested not in self._configured:
                if not untold:
                    raise UnknownModel(f"The model `{requested}` does not exist.", param="model")
                raise NoPodAvailable(f"No pod serves the model `{requested}`; {len(untold)} have not answered yet.")
            if not untold:
                raise NoPodAvailable(f"No pod serves the model `{requested}` at the moment.")
            index_name, pods = name, untold
        return index_name, [pod for pod in pods if pod.healthy] or pods

    def configured_name(self, model: str, pods: Sequence[Pod]) -> str:
        """The name under which a model that `pods` serve is configured, which may be one of its aliases; else its own."""
        if model in self._configured:
            return self._configured[model]
        aliases = {
            alias for pod in pods if pod.served is not None and pod.base_model == model for alias in pod.served.aliases
        }
        return next((self._configured[alias] for alias in sorted(aliases) if alias in self._configured), model)

    def models(self) -> list[ServedModel]:
        """Every name that `resolve` finds pods for, by name."""
        found: dict[str, str | None] = {}
        for pod in self.pods:
            if pod.served is not None:
                found.update(dict.fromkeys(pod.served.aliases))
                found.update(pod.served.adapters)
        untold = any(pod.served is None for pod in self.pods)
        for alias, name in self._configured.items():
            if name in found:
                found.setdefault(alias, found[name])
            elif untold:
                found.setdefault(alias, None)
        return [ServedModel(name=name, parent=found[name]) for name in sorted(found)]

    def base_models(self) -> list[str]:
        """The index's names of the models that engines have told of, without adapters."""
        return sorted({pod.base_model for pod in self.pods if pod.base_model is not None})

    def is_endpoint(self, name: str) -> bool:
        """Whether it is the name of a pod, or of a rank of one."""
        pod = self._by_name.get(name) or self._by_name.get(EndpointName.parse(name).pod)
        return pod is not None and any(endpoint.name == name for endpoint in pod.endpoints)

    def names(self) -> set[str]:
        """Every name of a model that is served now, and every one that is configured."""
        served = [pod.served for pod in self.pods if pod.served is not None]
        return set(self._configured).union(*(each.aliases for each in served), *(each.adapters for each in served))

    def any_healthy(self) -> bool:
        """Whether at least one pod is healthy."""
        return any(pod.healthy for pod in self.pods)

    def metrics_of(self, pod: Pod, now: float) -> EngineMetrics | None:
        """The pod's last metrics, or None when there are none or they are too old to say anything."""
        metrics = pod.metrics
        if metrics is None or now - metrics.read_at > self._watch.stale_after_seconds:
            return None
        return metrics

    def name_at(self, pod: str, requested: str) -> str:
        """The name to ask a pod for: the requested one where the pod may know it, else the one it is an alias of."""
        state = self._by_name.get(pod)
        if state is not None and state.index_name(requested) is not None:
            return requested
        return self._configured.get(requested, requested)

    def failed(self, pod: str) -> None:
        """The pod refused or broke a connection, or did not answer a read in time."""
        state = self._by_name.get(pod)
        if state is None:
            return
        state.failures += 1
        if state.failures >= self._watch.unhealthy_after_failures:
            state.healthy = False

    def answered(self, pod: str) -> None:
        """The pod answered something other than a server error."""
        state = self._by_name.get(pod)
        if state is not None:
            state.failures = 0
            state.healthy = True

    def learn(
        self, pod: str, *, served: ServedNames | None = None, kv_sources: tuple[KvEventsConfig, ...] | None = None
    ) -> None:
        """Record what the pod serves or where it publishes; None leaves what was known."""
        state = self._by_name.get(pod)
        if state is None:
            return
        if served is not None:
            state.served = served
        if kv_sources is not None:
            state.publishes(kv_sources)

    def measured(self, pod: str, metrics: EngineMetrics) -> None:
        """The pod's metrics were read."""
        state = self._by_name.get(pod)
        if state is not None:
            state.metrics = metrics

    def _serving(self, name: str) -> tuple[str, list[Pod]]:
        """Pods known to serve a name. Where engines name the same model differently, the first pod's name counts."""
        names = [(pod, pod.index_name(name)) for pod in self.pods]
        serving = [(pod, index_name) for pod, index_name in names if index_name is not None]
        return serving[0][1] if serving else name, [pod for pod, _ in serving]


def _configured_sources(pod: PodConfig) -> tuple[KvEventsConfig, ...] | None:
    if pod.kv_events == "discover":
        return None
    return () if pod.kv_events == "none" else (pod.kv_events,)
