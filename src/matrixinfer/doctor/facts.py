"""What was seen of a fleet: plain values, from which `diagnose` makes findings. None means that it is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from matrixinfer.config import KvEventsConfig, ModelConfig
from matrixinfer.pods.registry import ServedNames

Following: TypeAlias = Literal["discover", "none", "configured"]
"""What the config says of a pod's KV events."""
Replay: TypeAlias = Literal["answers", "silent", "foreign"]
"""What asking for past batches brought: what was published; no end of the answer in time; another publisher's batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFacts:
    """One prompt that was tokenized here and by the engine."""

    what: str
    """Such as `a text`."""
    optional: bool = False
    """Not every model takes such a prompt."""
    here: str | None = None
    """Why it could not be tokenized here."""
    there: str | None = None
    """Why the engine did not tell its ids."""
    compared: bool = False
    first_difference: int | None = None
    """Position of the first id that differs; None where none does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeFacts:
    """A new prompt that was sent to one publisher twice. Counts are of tokens."""

    refused: str | None = None
    """Why it was not computed."""
    tokens: int = 0
    """Of the prompt, as this gateway counts them."""
    predicted: int = 0
    """Hit of the second time that the events of the first foretold."""
    cached: int | None = None
    """Hit of the second time, by its usage."""
    hits: int | None = None
    """By how much the engine's own count of hits grew the second time; other requests may be in it."""
    first_difference: int | None = None
    """Where the tokens in its events are others than here."""
    elsewhere: str | None = None
    """Another publisher of the pod whose events told of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedFacts:
    """One publisher of KV events: a pod's, or one of its data-parallel ranks'."""

    name: str
    source: KvEventsConfig
    error: str | None = None
    """Why the endpoint is none, or its name has no address."""
    connected: bool = False
    frames: int = 0
    """Live ones under a topic that is taken."""
    other_topics: Sequence[str] = ()
    """Topics of frames that are not."""
    malformed: int = 0
    untrusted: str | None = None
    """Why its events do not tell what it holds."""
    block_size: int | None = None
    """Tokens per engine block, by its events."""
    hides_salts: bool = False
    hides_adapters: bool = False
    clock_ahead: float | None = None
    """Seconds from here to the time that its last batch bears."""
    replay: Replay | None = None
    """None where there is no replay endpoint."""
    probe: ProbeFacts | None = None
    """None where none was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodFacts:
    """One engine. Of one that is `down` nothing else is known."""

    name: str
    url: str
    host: str
    """Of the URL."""
    token_block: int
    """Tokens per block that is hashed here (`blockSizeToHash`)."""
    following: Following
    down: str | None = None
    version: str | None = None
    served: ServedNames | None = None
    models_status: int | None = None
    """HTTP status of `/v1/models`; None for a server error or no answer."""
    sources_status: int | None = None
    """That of `/kv_event_sources`."""
    told: Sequence[KvEventsConfig] = ()
    """Publishers that the engine itself names, by rank."""
    ranks: int = 1
    """Data-parallel ranks, by its metrics."""
    prefix_caching: bool | None = None
    block_size: int | None = None
    """Tokens per engine block, by its metrics."""
    clock_ahead: float | None = None
    """Seconds from here to the time on its clock, by the Date header: at least that much, in either direction."""
    samples: Sequence[SampleFacts] = ()
    feeds: Sequence[FeedFacts] = ()
    """What this gateway would follow."""

    @property
    def engine_block(self) -> int | None:
        """Tokens per engine block, by its events or else its metrics."""
        sizes = [feed.block_size for feed in self.feeds if feed.block_size is not None]
        return max(sizes) if sizes else self.block_size

    @property
    def probes(self) -> Sequence[ProbeFacts]:
        """Those that were computed."""
        return [feed.probe for feed in self.feeds if feed.probe is not None and feed.probe.refused is None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisFacts:
    """The server of the shared index, and what this config wants of it."""

    where: str
    looks_up: bool
    """Look-ups go there; else it is written to, or only for starting warm."""
    writer: str
    scheme: Mapping[str, str]
    """How blocks are made here."""
    error: str | None = None
    """Why it cannot be asked."""
    slow: bool = False
    refuses_scripts: bool = False
    clock_ahead: float | None = None
    """Seconds by which its clock is ahead of the one here."""
    schemes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Models whose blocks there are made otherwise, and how."""
    vouched: frozenset[str] = frozenset()
    """Endpoints whose writer is alive, and believes their events."""

    def but(self, **changes: Any) -> RedisFacts:
        """The same but for some."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetFacts:
    """Every pod, and what the config says of all of them."""

    models: Sequence[ModelConfig]
    pods: Sequence[PodFacts]
    redis: RedisFacts | None = None
    """None where none is configured."""
    endpoints: Sequence[str] = ()
    """Names of all pods, or of their ranks."""
