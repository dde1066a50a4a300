"""What is known about one pod (engine replica). Values only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from matrixinfer.config import PodConfig
from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.pods.boot import BootMarks
from matrixinfer.pods.engine_kind import EngineFacts, EngineKind, kind_of
from matrixinfer.pods.load_reports import LoadReport
from matrixinfer.pods.model_cards import ModelCard
from matrixinfer.pods.publishers import KvSource

Sleep: TypeAlias = Literal["paused", "weights_offloaded", "discard_all"]
"""How an engine sleeps: it only computes nothing; or it has given its KV cache away, and its weights are off the device
or discarded."""


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
    cache_tokens: int | None = None
    """Tokens that the cache of the engine, or of each of its ranks, can hold."""
    prefix_caching: bool | None = None
    """Whether the engine reuses the blocks of earlier prompts (prefix caching)."""
    sleep: Sleep | None = None
    """How the engine sleeps; None if it is awake or does not say."""
    started_at: float | None = None
    """When the engine's process started, in Unix seconds on its clock."""
    adapters: tuple[str, ...] | None = None
    """The adapters that it used last, the latest first, as many as it has on its device; None if it does not say."""
    most_adapters: int = 0
    """How many adapters it can have on its device."""
    boot: BootMarks = field(default_factory=BootMarks)
    """What shows that the engine has restarted."""
    ranks: Mapping[int, RankMetrics] = field(default_factory=dict)
    """The metrics of each data-parallel rank, if the engine reports them separately."""


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
    """The data-parallel rank, as the engine calls it; None for the whole pod."""


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
    """The owner of the models, by which most engines name their kind, such as `vllm` or `sglang`."""
    root: str | None = None
    """Where the base model was loaded from, which may change under the same name."""
    context_length: int | None = None
    """Maximum number of tokens of prompt and reply together; None if the engine does not report it."""
    cards: Mapping[str, ModelCard] = field(default_factory=dict, compare=False)
    """What it says about each model. Engines say `created` differently each time, so this is no news."""


@dataclass(frozen=True, slots=True)
class Drain:
    """A pod gets no more requests because it will leave. Times are seconds on the registry's clock."""

    began: float
    ends: float
    """When it leaves at the latest."""


@dataclass(slots=True, kw_only=True, eq=False)
class Pod:
    """The last known state of one engine replica. Only its registry changes it."""

    config: PodConfig
    served: ServedNames | None = None
    """None until the engine has reported it, unless the configuration says it."""
    facts: EngineFacts | None = None
    """None until the engine has reported them."""
    kv_sources: tuple[KvSource, ...] | None = None
    """Its publishers of KV events, one per data-parallel rank; empty if it has none, None if it was not asked yet."""
    metrics: EngineMetrics | None = None
    ranks: frozenset[int] = frozenset()
    """The data-parallel ranks that its metrics show, if several."""
    loads: dict[str, LoadReport] = field(default_factory=dict)
    """The last load that it published, by endpoint."""
    restarts: int = 0
    """How often its metrics have shown that it is another run of the engine, or another engine."""
    failures: int = 0
    """Number of consecutive failures."""
    healthy: bool = False
    """False until the first answer, and after too many consecutive failures."""
    gone: bool = False
    """True once the pod has left the registry: no more requests are sent there."""
    drain: Drain | None = None
    """None unless it is being drained."""
    up_since: float | None = None
    """When it was last found to answer after it did not, in seconds on the registry's clock."""
    when_down: dict[Callable[[], None], None] = field(default_factory=dict)
    """What to call when it is declared down, in order."""
    endpoints: Sequence[Endpoint] = ()
    """The pod itself, or each data-parallel rank if it publishes events of several ranks."""

    def __post_init__(self) -> None:
        if self.served is None and (model := self.config.model) is not None:
            self.served = ServedNames(base_model=model, aliases=frozenset({model}), adapters={})
        self.name_endpoints()

    @property
    def name(self) -> str:
        """The unique name."""
        return self.config.name

    @property
    def url(self) -> str:
        """The base URL of its HTTP API."""
        return self.config.url

    @property
    def engine(self) -> EngineKind | None:
        """The kind of engine; None until it is known."""
        if self.facts is not None:
            return self.facts.kind
        return None if self.served is None else kind_of(self.served.engine)

    @property
    def version(self) -> str | None:
        """The engine's version; None if it does not report it."""
        return None if self.facts is None else self.facts.version

    @property
    def base_model(self) -> str | None:
        """The engine's own name of its model; None until the engine has reported it."""
        return None if self.served is None else self.served.base_model

    @property
    def asleep(self) -> Sleep | None:
        """How it sleeps; None if it is awake or does not say. It answers all the same, but computes nothing."""
        return None if self.metrics is None else self.metrics.sleep

    @property
    def rank_count(self) -> int:
        """How many data-parallel ranks the engine has, by its metrics or by its own word; 1 if it does not say."""
        return max(len(self.ranks), (self.facts and self.facts.ranks) or 1, len(self.kv_sources or ()))

    def position(self, rank: int) -> int:
        """How the engine's API counts a rank. A vLLM that serves ranks from 8 on calls the first of them 0 there."""
        named = {source.rank for source in self.kv_sources or () if source.rank is not None}
        return rank - min(named | (self.ranks if named <= self.ranks else frozenset()), default=0)

    def name_endpoints(self) -> None:
        """Set the endpoints. A pod is one endpoint; if several ranks say where they publish, every rank that is known is one."""
        ranks: set[int | None] = {source.rank for source in self.kv_sources or ()}
        if len(ranks) < 2:
            names: list[int | None] = [None]
        else:
            known = {rank for rank in ranks if rank is not None}
            names = [*sorted(known | self.ranks if known <= self.ranks else known)]
        if [endpoint.rank for endpoint in self.endpoints] != names:
            self.endpoints = tuple(
                Endpoint(name=str(EndpointName(self.name, rank)), pod=self, rank=rank) for rank in names
            )
            self.loads.clear()

    def index_name(self, name: str) -> str | None:
        """The index's name of a model if this engine is known to serve it, else None."""
        if self.served is None:
            return None
        if name in self.served.aliases:
            return self.served.base_model
        return name if name in self.served.adapters else None
