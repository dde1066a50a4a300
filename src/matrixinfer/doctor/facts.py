"""Facts about a fleet, as plain values. `checks` turns them into findings. None means that a fact is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from matrixinfer.config import KvEventsConfig, ModelConfig
from matrixinfer.index.redis.failures import RedisFailure
from matrixinfer.pods.engine_kind import EngineKind
from matrixinfer.pods.pod import Sleep
from matrixinfer.pods.publishers import KvSource
from matrixinfer.pods.registry import ServedNames
from matrixinfer.prompt.samples import SampleFacts
from matrixinfer.prompt.source import Source
from matrixinfer.trust.sent_ids.found import Probed

Following: TypeAlias = Literal["discover", "none", "configured"]
"""How the config says to find a pod's KV events."""
Replay: TypeAlias = Literal["answers", "silent", "foreign"]
"""How a replay endpoint answered: with what was published; not completely in time; with another publisher's batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeFacts:
    """A new prompt that was sent twice to one endpoint. Counts are in tokens."""

    failure: str | None = None
    """Why the engine did not compute it."""
    tokens: int = 0
    """Length of the prompt, as the gateway counts it."""
    predicted: int = 0
    """Predicted hit of the second request, from the events of the first."""
    cached: int | None = None
    """Reported hit of the second request, from the `usage` of its answer."""
    hits: int | None = None
    """Growth of the engine's hit counter during the second request; other requests may have added to it."""
    first_difference: int | None = None
    """Position of the first token in the engine's events that differs from the gateway's."""
    published_by: str | None = None
    """Another publisher of the pod that published the prompt's blocks instead."""
    prompt: bytes = field(default=b"", repr=False)
    """The first token ids of the prompt, in the form of `blocks.token_bytes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedFacts:
    """One publisher of KV events: a pod, or one of its data-parallel ranks."""

    name: str
    source: KvEventsConfig
    error: str | None = None
    """Why the endpoint cannot be used: it is invalid, or its host name does not resolve."""
    connected: bool = False
    frames: int = 0
    """Live frames with an accepted topic."""
    other_topics: Sequence[str] = ()
    """Topics of the other frames."""
    malformed: int = 0
    other_rank: str | None = None
    """What is wrong if its batches name another rank than the one that it is listed as."""
    untrusted: str | None = None
    """Why its events do not show what it caches."""
    block_size: int | None = None
    """Tokens per engine block, from its events."""
    hides_salts: bool = False
    hides_adapters: bool = False
    limits: Sequence[str] = ()
    """What its events cannot tell, in words that name the remedy after a semicolon."""
    clock_ahead: float | None = None
    """Seconds by which the timestamp of its last batch is ahead of the local clock."""
    replay: Replay | None = None
    """None without a replay endpoint."""
    probe: ProbeFacts | None = None
    """None when no probe was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodFacts:
    """One engine. If it is `down`, nothing else is known about it."""

    name: str
    url: str
    host: str
    """Host of the URL."""
    token_block: int
    """Tokens per block that the gateway hashes (`blocks.size`)."""
    following: Following
    down: str | None = None
    engine: EngineKind | None = None
    version: str | None = None
    asleep: Sleep | None = None
    """How the engine sleeps; None if it is awake or does not say."""
    served: ServedNames | None = None
    models_status: int | None = None
    """HTTP status of `/v1/models`; None for a server error or no answer."""
    has_key: bool = False
    """Whether the gateway has an API key for it."""
    sources_status: int | None = None
    """HTTP status of `/kv_event_sources`; None for a server error or no answer."""
    reported_sources: Sequence[KvSource] = ()
    """Publishers that the engine itself reports, in the order of their ranks."""
    ranks: int = 1
    """Data-parallel ranks, from its metrics or its own word."""
    prefix_caching: bool | None = None
    block_size: int | None = None
    """Tokens per engine block, from its metrics."""
    clock_ahead: float | None = None
    """Seconds by which its clock is ahead of the local one, or behind if negative; a lower bound, from the Date header."""
    samples: Sequence[SampleFacts] = ()
    source: Source | None = None
    """Where the token ids of its model come from."""
    asking: Mapping[str, object] | None = None
    """What it costs to ask for token ids, as in `/debug/tokenizers`."""
    wait_ms: float | None = None
    """How long a decision waits for them."""
    sent_ids: Sequence[Probed] = ()
    """What the engine does with token ids, by path; empty unless the gateway is to send them."""
    feeds: Sequence[FeedFacts] = ()
    """The publishers that the gateway would follow."""

    @property
    def engine_block(self) -> int | None:
        """Tokens per engine block, from its events or else its metrics."""
        sizes = [feed.block_size for feed in self.feeds if feed.block_size is not None]
        return max(sizes) if sizes else self.block_size

    @property
    def probes(self) -> Sequence[ProbeFacts]:
        """The probes that the engine computed."""
        return [feed.probe for feed in self.feeds if feed.probe is not None and feed.probe.failure is None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignFacts:
    """What writers of other projects have written."""

    probed: bool
    """Whether there are new prompts that their engines computed."""
    fits: Sequence[str] = ()
    """Models for which such a prompt is in Redis as the gateway expects it."""
    mismatches: Sequence[tuple[str, str]] = ()
    """Why lookups cannot match, and what to do: from the probes, from names of pods, and from a running gateway."""
    absent: Sequence[str] = ()
    """Models for which no such prompt was found."""
    without_start: Sequence[str] = ()
    """Pods whose engine does not report when it started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisFacts:
    """The server of the shared index, and how the config uses it."""

    where: str
    is_index: bool
    """The gateway looks blocks up there. If not, it only writes, or reads once at start."""
    writer: str
    scheme: Mapping[str, str]
    """How the gateway makes blocks: block size and hash scheme."""
    error: str | None = None
    """Why it cannot be used."""
    failure: RedisFailure = "unreachable"
    """What kind of error that is."""
    username: str | None = None
    unreadable: Sequence[str] = ()
    """Keys that hold something else than a hash."""
    foreign: ForeignFacts | None = None
    """None if this project's own writers write."""
    slow: bool = False
    refuses_scripts: bool = False
    clock_ahead: float | None = None
    """Seconds by which its clock is ahead of the local one."""
    schemes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Schemes of the models whose blocks there are made differently."""
    endpoints_written: frozenset[str] = frozenset()
    """Endpoints that have a live writer which trusts their events."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetFacts:
    """Facts about every pod, and about the fleet as a whole."""

    models: Sequence[ModelConfig]
    pods: Sequence[PodFacts]
    redis: RedisFacts | None = None
    """None when the config has no Redis."""
    endpoints: Sequence[str] = ()
    """Names of all endpoints: pods, or their ranks."""

    @property
    def urls(self) -> dict[str, str]:
        """The URL of each pod, by its name."""
        return {pod.name: pod.url for pod in self.pods}
