"""Stores what is known about every pod, and finds the pods that serve a model.

It does no I/O: the watcher and the router report their observations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from matrixinfer.config import ModelConfig, PodConfig, PodWatchConfig
from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.errors import InvalidRequest, NoPodAvailable, UnknownModel
from matrixinfer.pods.boot import is_another_run
from matrixinfer.pods.engine_kind import EngineFacts, EngineKind
from matrixinfer.pods.load_reports import FRESH_SECONDS, LoadReport
from matrixinfer.pods.model_cards import ModelCard, ServedModel, kept, merged
from matrixinfer.pods.pod import Drain, Endpoint, EngineMetrics, Pod, RankMetrics, ServedNames
from matrixinfer.pods.publishers import KvSource, configured_source

__all__ = ["Endpoint", "EngineMetrics", "Pod", "PodRegistry", "RankMetrics", "ServedModel", "ServedNames"]


_NO_PODS = "The gateway has no pods now: none was found yet, or all were drained or removed."


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
        self.newest_up = float("-inf")
        """When a pod was last found to answer after it did not."""
        self._known_to_serve: dict[str, tuple[str, Sequence[Pod]]] = {}  # emptied when pods or their models change
        self._named: dict[str, tuple[Sequence[Pod], str]] = {}  # the last answers of `configured_name`
        self._resolved: dict[
            str, tuple[str, Sequence[Pod]]
        ] = {}  # emptied also when health, drains, sleep, engines or endpoints change
        self._configured = _names(models)
        self._has_one_model = len(models) == 1
        self._names_in_redis = {model.name: model.index_name for model in models if model.index_name is not None}

    def reconfigure(self, watch: PodWatchConfig, models: Sequence[ModelConfig]) -> None:
        """Judge health and age by this from now on, and know models by these aliases."""
        self._watch = watch
        self._configured = _names(models)
        self._serves_another()

    def join(self, config: PodConfig) -> Pod:
        """Add a pod. Raises `ValueError` if a pod with that name exists."""
        if config.name in self._by_name:
            raise ValueError(f"a pod named `{config.name}` already exists")
        pod = self._by_name[config.name] = Pod(config=config, kv_sources=_configured_sources(config))
        self.pods = (*self.pods, pod)
        self._serves_another()
        return pod

    def leave(self, name: str) -> Pod | None:
        """Remove a pod and return it; None if no pod has that name."""
        pod = self._by_name.pop(name, None)
        if pod is not None:
            pod.gone = True
            self.pods = tuple(self._by_name.values())
            self._serves_another()
        return pod

    def pod(self, name: str) -> Pod | None:
        """The pod with that name, if there is one."""
        return self._by_name.get(name)

    def has(self, pod: str, endpoint: str) -> bool:
        """Whether the pod has an endpoint with that name."""
        state = self._by_name.get(pod)
        return state is not None and any(each.name == endpoint for each in state.endpoints)

    def set_drain(self, pod: Pod, drain: Drain | None) -> None:
        """A pod begins to drain; None ends that."""
        pod.drain = drain
        self._resolved.clear()

    def resolve(self, requested: str) -> tuple[str, Sequence[Pod]]:
        """The index's name of a model, and the pods that may serve it.

        Returns only healthy pods that are awake, or sleeping ones if none is, or as a last resort all pods; never one that is
        drained. The same tuple means that none of these pods has another model, engine or endpoint than before. If no pod is
        known to serve the only configured model, pods that have not reported their models yet are assumed to serve it. Raises
        `UnknownModel` if the model is not configured and all pods have reported other models; `NoPodAvailable` if no pod
        serves the model now, but one may later.
        """
        known = self._resolved.get(requested)
        if known is not None:
            return known
        if not self.pods:
            raise NoPodAvailable(_NO_PODS)
        name = self._configured.get(requested, requested)
        index_name, pods = self._serving(name)
        is_known = bool(pods)
        if not pods:
            unidentified = [pod for pod in self.pods if pod.served is None]
            if requested not in self._configured:
                if not unidentified:
                    raise UnknownModel(
                        f"The model `{requested}` does not exist; `GET /v1/models` lists those that do.", param="model"
                    )
                raise NoPodAvailable(f"No pod is known to serve the model `{requested}`: {_why_unknown(unidentified)}.")
            if not unidentified:
                raise NoPodAvailable(f"No pod serves the model `{requested}` at the moment.")
            if not self._has_one_model:  # they may serve another one
                raise NoPodAvailable(f"No pod is known to serve the model `{requested}`: {_why_unknown(unidentified)}.")
            index_name, pods = name, unidentified
        healthy = [pod for pod in pods if pod.healthy and pod.drain is None]
        awake = [pod for pod in healthy if pod.metrics is None or pod.metrics.sleep is None]
        found = tuple(awake or healthy or [pod for pod in pods if pod.drain is None])
        if not found:
            raise NoPodAvailable(f"Every pod that serves the model `{requested}` is being drained.")
        if is_known:  # so that names which nobody serves take no memory
            self._resolved[requested] = index_name, found
        return index_name, found

    def is_served(self, requested: str) -> bool:
        """Whether a pod has reported that it serves a model of that name, or of the name that it is an alias of."""
        return bool(self._serving(self._configured.get(requested, requested))[1])

    def configured_name(self, model: str, pods: Sequence[Pod]) -> str:
        """The configured name of a model that `pods` serve, found by the model's own name or an alias; else its own name."""
        if model in self._configured:
            return self._configured[model]
        known = self._named.get(model)
        if known is None or known[0] is not pods:
            known = self._named[model] = pods, self._found_by_alias(model, pods)
        return known[1]

    def _found_by_alias(self, model: str, pods: Sequence[Pod]) -> str:
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
        unidentified = self._has_one_model and any(pod.served is None for pod in self.pods)
        for alias, name in self._configured.items():
            if name in found:
                found.setdefault(alias, found[name])
            elif unidentified:
                found.setdefault(alias, None)
        return [ServedModel(name=name, parent=found[name], card=self._card(name)) for name in sorted(found)]

    def only_model(self) -> str:
        """The model that is meant where a request names none: the only one that is served, whatever its adapters.

        Raises `InvalidRequest` if there are several, and `NoPodAvailable` if no pod has reported one yet.
        """
        reported = {self.configured_name(model, self.pods): model for model in self.base_models()}
        if any(pod.served is None for pod in self.pods):
            reported = {**{name: name for name in self._configured.values()}, **reported}
        if len(reported) > 1:
            several = ", ".join(f"`{name}`" for name in sorted(reported)[:10])
            raise InvalidRequest(f"`model` is required: several models are served, such as {several}", param="model")
        if not reported:
            raise NoPodAvailable(_NO_PODS if not self.pods else "No pod has reported its model yet.")
        configured, model = next(iter(reported.items()))
        return configured if self.is_served(configured) else model

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
        """Whether at least one pod is healthy and gets requests."""
        return any(pod.healthy and pod.drain is None for pod in self.pods)

    def metrics_of(self, pod: Pod, now: float) -> EngineMetrics | None:
        """The pod's last metrics; None if there are none or they are too old to be useful."""
        metrics = pod.metrics
        if metrics is None or now - metrics.read_at > self._watch.stale_after_seconds:
            return None
        return metrics

    def fresh_until(self, metrics: EngineMetrics) -> float:
        """When these metrics become too old."""
        return metrics.read_at + self._watch.stale_after_seconds

    def name_at(self, pod: str, requested: str) -> str:
        """The model name to send to a pod: the requested name if the pod knows it, else the name that it is an alias of."""
        state = self._by_name.get(pod)
        if state is not None and state.index_name(requested) is not None:
            return requested
        return self._configured.get(requested, requested)

    def spellings(self, pod: str, name: str) -> tuple[str, ...]:
        """The names by which a pod may answer a request that it gets under `name`."""
        state = self._by_name.get(pod)
        served = None if state is None else state.served
        own = served is not None and name in served.aliases and served.base_model != name
        return (name, served.base_model) if served is not None and own else (name,)

    def engine_of(self, pod: str) -> EngineKind | None:
        """The kind of engine of a pod; None if it is not known."""
        state = self._by_name.get(pod)
        return None if state is None else state.engine

    def position(self, pod: str, rank: int) -> int:
        """How the API of a pod's engine counts a rank."""
        state = self._by_name.get(pod)
        return rank if state is None else state.position(rank)

    def failed(self, pod: str) -> None:
        """Report that the pod refused or broke a connection, or did not answer in time."""
        state = self._by_name.get(pod)
        if state is None:
            return
        state.failures += 1
        if state.failures >= self._watch.unhealthy_after_failures:
            state.healthy = False
            self._resolved.clear()
            for act in tuple(state.when_down):
                act()

    def watch_down(self, pod: str, act: Callable[[], None]) -> None:
        """Call `act` whenever a report leaves the pod unhealthy, until `unwatch_down`."""
        state = self._by_name.get(pod)
        if state is not None:
            state.when_down[act] = None

    def unwatch_down(self, pod: str, act: Callable[[], None]) -> None:
        """Undo `watch_down`."""
        state = self._by_name.get(pod)
        if state is not None:
            state.when_down.pop(act, None)

    def answered(self, pod: str) -> None:
        """Report that the pod answered with something other than a server error."""
        state = self._by_name.get(pod)
        if state is not None:
            state.failures = 0
            if not state.healthy:
                state.healthy = True
                self._resolved.clear()
                state.up_since = self.newest_up = self.clock()

    def learn(
        self,
        pod: str,
        *,
        served: ServedNames | None = None,
        facts: EngineFacts | None = None,
        kv_sources: tuple[KvSource, ...] | None = None,
    ) -> None:
        """Record the pod's models, facts or publishers; None leaves the previous value."""
        state = self._by_name.get(pod)
        if state is None:
            return
        if served is not None:
            before = {} if state.served is None else state.served.cards
            is_news = served != state.served
            state.served = replace(served, cards=kept(served.cards, before))
            if is_news:
                self._serves_another()
        if facts is not None and facts != state.facts:
            state.facts = facts
            self._resolved.clear()
        if kv_sources is not None and kv_sources != state.kv_sources:
            state.kv_sources = kv_sources
            state.name_endpoints()
            self._resolved.clear()

    def measured(self, pod: str, metrics: EngineMetrics) -> None:
        """Record a reading of the pod's metrics."""
        state = self._by_name.get(pod)
        if state is None:
            return
        if state.metrics is not None and is_another_run(state.metrics.boot, metrics.boot):
            state.restarts += 1
        if metrics.sleep != state.asleep:
            self._resolved.clear()
        state.metrics = metrics
        if metrics.running is not None and metrics.ranks.keys() != state.ranks:
            state.ranks = frozenset(metrics.ranks)
            state.name_endpoints()
            self._resolved.clear()

    def published_load(self, pod: str, endpoint: str, report: LoadReport) -> None:
        """Record the load that an endpoint of the pod has published."""
        if self.has(pod, endpoint):
            self._by_name[pod].loads[endpoint] = report

    def load_of(self, endpoint: Endpoint, now: float) -> LoadReport | None:
        """The load that an endpoint has published; None if it publishes none, or has not lately."""
        report = endpoint.pod.loads.get(endpoint.name)
        return None if report is None or now - report.read_at > FRESH_SECONDS else report

    def _serves_another(self) -> None:
        """Pods, or the models of one, have changed."""
        self._known_to_serve.clear()
        self._named.clear()
        self._resolved.clear()

    def _card(self, name: str) -> ModelCard:
        """What the pods that serve a name say about it; what they say about their own model if the name is an alias here."""
        cards = []
        own = self._configured.get(name, name)
        for pod in self.pods:
            if pod.served is not None:
                card = pod.served.cards.get(name) or pod.served.cards.get(own)
                if card is not None:
                    cards.append(card)
        return merged(cards)

    def _serving(self, name: str) -> tuple[str, Sequence[Pod]]:
        """The pods known to serve a name. If engines name the same model differently, the first pod's name is used."""
        found = self._known_to_serve.get(name)
        if found is None:
            names = [(pod, pod.index_name(name)) for pod in self.pods]
            serving = [(pod, index_name) for pod, index_name in names if index_name is not None]
            found = serving[0][1] if serving else name, tuple(pod for pod, _ in serving)
            if serving:  # so that names which nobody serves take no memory
                self._known_to_serve[name] = found
        return found


def _names(models: Sequence[ModelConfig]) -> dict[str, str]:
    """The name of each model, by it and by its aliases."""
    return {alias: model.name for model in models for alias in (model.name, *model.aliases)}


def _why_unknown(unidentified: Sequence[Pod]) -> str:
    """Why it is not known what these pods serve, in words."""
    withholding = sum(pod.healthy for pod in unidentified)
    silent = len(unidentified) - withholding
    why = [f"{withholding} do not say what they serve (they may require an API key)"] if withholding else []
    return " and ".join([*why, *([f"{silent} have not answered yet"] if silent else [])])


def _configured_sources(pod: PodConfig) -> tuple[KvSource, ...] | None:
    if pod.kv_events == "discover":
        return None
    return () if pod.kv_events == "none" else (configured_source(pod.kv_events),)
