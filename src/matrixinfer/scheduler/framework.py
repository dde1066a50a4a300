"""The plugin contract, whole.

A plugin is a class with a `name`, an `Args` struct for its arguments in YAML, a constructor `(args, services)`, and the
methods of one or more of the four stages below. Plugins are synchronous and do no I/O: whatever must be awaited is
already in the request and the candidates. Lists returned are aligned with `candidates`. Packages add plugins through
the entry-point group `matrixinfer.plugins`, whose entries name plugin classes.

    candidates ─> Filter … ─> Scorer … ─> Picker ─> Decision ─> PostSchedule …
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import msgspec

from matrixinfer.config import Section
from matrixinfer.config.endpoint_names import EndpointName

Trust: TypeAlias = Literal["exact", "partial", "stale", "none"]
"""How far what the index says of an endpoint is believed: all and only that is cached; true, but more may be; may be
untrue; says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingRequest:
    """One request as plugins see it."""

    id: str
    model: str
    """The index's name of the model (adapters are models of their own)."""
    prompt_tokens: int | None
    """Tokens in the prompt; None when it was not tokenized."""
    block_size: int
    """Tokens per block of `chain`."""
    chain: Sequence[int]
    """Hashes of the prompt's full blocks, computed as they are read. Empty when not tokenized."""
    prefix: bytes
    """The prompt as the client sent it (text, or messages as JSON), for approximate matching without tokens."""
    session: str | None = None
    """The client's session id, where it sends one."""
    now: float = 0.0
    """Seconds on the monotonic clock."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One pod, or one data-parallel rank of it, at the moment of the decision. None means unknown, which is not zero.

    A struct because hundreds are made per decision, and it is made in a third of a dataclass's time.
    """

    name: str
    """The pod's, or `pod@dp0` for a rank of it."""
    url: str
    rank: int | None = None
    """Data-parallel rank; None for a pod that is one cache."""
    in_flight: int = 0
    """Requests that this gateway, and others that it hears, have in flight there."""
    queued_tokens: int = 0
    """Prompt tokens of those requests that the pod has yet to compute, as far as the gateways know."""
    peers_in_flight: int = 0
    """How many of `in_flight` are of other gateways."""
    running: int | None = None
    waiting: int | None = None
    cache_usage: float | None = None
    """Engine metrics: requests running and waiting, share of KV blocks in use (0 to 1)."""
    metrics_age: float | None = None
    """Seconds since those metrics were read."""
    feed: str | None = None
    """State of the pod's KV events: `complete`, or why more or less may be cached than indexed; None without a feed."""
    trust: Trust = "none"
    engine_block: int | None = None
    """Tokens per block of the engine's cache; None until its events told."""
    matched_blocks: int | None = None
    """Consecutive blocks from the start that the index says the pod holds; None when the index could not say."""
    matched_tail: int = 0
    """Tokens held beyond those blocks, to the end of an engine block that reaches over the last one's end."""
    tiers: Sequence[int] = ()
    """Where the pod keeps blocks on slower tiers too: how many of `matched_blocks`, from the start, are on the device; on
    the device or in the host's memory."""
    pending_blocks: int = 0
    """Further consecutive blocks that requests in flight, or just finished, are bringing there."""
    recent_blocks: int = 0
    """Consecutive blocks from the start that were sent there lately, where the index cannot say whether it holds them."""
    cached_credit: float | None = None
    """What the blocks matched and sent count for (`matrixinfer.scheduler.credit`); None: each of `matched_blocks` one."""

    @property
    def pod(self) -> str:
        """Name of the pod that it is, or that it is a rank of."""
        return self.name if self.rank is None else EndpointName.parse(self.name).pod

    @property
    def credit(self) -> float:
        """What counts as held of the prompt, in blocks: matched, sent and on their way."""
        return ((self.matched_blocks or 0) if self.cached_credit is None else self.cached_credit) + self.pending_blocks

    def predicted_hit(self, prompt_tokens: int | None, block_size: int) -> int:
        """Prompt tokens that the pod is expected to find in its cache: whole engine blocks, and never the last token.

        `block_size` is that of the blocks counted here.
        """
        if not prompt_tokens:
            return 0
        matched = self.matched_blocks or 0
        held = matched * block_size + self.matched_tail
        if self.pending_blocks or self.recent_blocks > matched:
            held = max(matched + self.pending_blocks, self.recent_blocks) * block_size
        size = self.engine_block or block_size
        return min(held, prompt_tokens - 1) // size * size

    @property
    def load(self) -> int:
        """Requests at the pod: those that gateways tell of, or the engine's count where others send to it as well."""
        engine = (self.running or 0) + (self.waiting or 0)
        return engine if engine > self.in_flight else self.in_flight  # noqa: FURB136  # twice as fast as max() here


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """A scorer's answer: one value from 0 to 100 per candidate, and a note where the values need a reason."""

    values: Sequence[float]
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the scheduler lends to plugins. Draws from `rng` are undone after a dry run."""

    clock: Callable[[], float]
    rng: random.Random


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What was decided, and all that is needed to say why."""

    request: SchedulingRequest
    candidates: Sequence[Candidate]
    ranked: Sequence[Candidate]
    """Best first; the rest are fallbacks. Filtered candidates are absent. Never empty."""
    filtered: Mapping[str, str]
    """Pod name to the filter that removed it and its reason."""
    scores: Mapping[str, Mapping[str, float]]
    """Scorer name to pod name to score, before weights."""
    totals: Mapping[str, float]
    """Pod name to weighted sum."""
    timings_ms: Mapping[str, float]
    """Milliseconds spent in each plugin."""
    notes: Sequence[str] = field(default_factory=tuple)
    """What the decision had to do without, in plain words."""

    @property
    def chosen(self) -> Candidate:
        """The best candidate."""
        return self.ranked[0]

    @property
    def attempts(self) -> Sequence[Candidate]:
        """Every pod worth trying, in order: the ranked ones and, as a last resort, those that filters removed.

        Of each pod its best rank: the others are behind the same address.
        """
        best: dict[str, Candidate] = {}
        for candidate in (*self.ranked, *(each for each in self.candidates if each.name in self.filtered)):
            best.setdefault(candidate.pod, candidate)
        return list(best.values())


class Plugin(Protocol):
    """What every plugin has."""

    name: ClassVar[str]
    Args: ClassVar[type[Section]]

    def __init__(self, args: Any, services: Services) -> None: ...


@runtime_checkable
class Filter(Protocol):
    """Removes candidates. A filter that would remove all of them is set aside for that request, and noted."""

    def filter(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[str | None]:
        """None to keep a candidate, or the reason to remove it."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Rates candidates."""

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        """0 (worst) to 100 (best) per candidate."""
        ...


@runtime_checkable
class Picker(Protocol):
    """Turns totals into a ranking."""

    def pick(
        self, request: SchedulingRequest, candidates: Sequence[Candidate], totals: Sequence[float]
    ) -> Sequence[int]:
        """Positions of all candidates, best first."""
        ...


@runtime_checkable
class PostSchedule(Protocol):
    """Learns of decisions. Not called for dry runs, so it is the only stage that may change a plugin's state."""

    def post_schedule(self, request: SchedulingRequest, decision: Decision) -> None:
        """The request goes to `decision.chosen`."""
        ...
