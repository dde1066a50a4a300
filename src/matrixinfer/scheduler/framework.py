"""The whole plugin contract.

A plugin is a class with a `name`, an `Args` struct for its arguments in YAML, a constructor `(args, services)`, and the
methods of one or more of the four stages below. Plugins are synchronous and do no I/O: everything that must be awaited
is already in the request and the candidates. A list that a plugin returns has one item per candidate, in the same
order. Packages add plugins through the entry-point group `matrixinfer.plugins`, whose entries name plugin classes.

    candidates ─> Filter … ─> Scorer … ─> Picker ─> Decision ─> PostSchedule …
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import msgspec

from matrixinfer.config import Section
from matrixinfer.config.endpoint_names import EndpointName

Trust: TypeAlias = Literal["exact", "partial", "stale", "none"]
"""How far the index is believed about an endpoint. `exact`: exactly what it says is cached. `partial`: that is cached, and
perhaps more. `stale`: that may no longer be cached. `none`: it says nothing."""


class SchedulingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request as plugins see it."""

    id: str
    model: str
    """The index's name for the model. An adapter is a model of its own."""
    prompt_tokens: int | None
    """Token ids that are known: all of the prompt's, or those before its first image, audio or video; None if it was not
    tokenized."""
    block_size: int
    """Tokens per block of `chain`."""
    chain: Sequence[int]
    """Hashes of the prompt's full blocks. Empty if the prompt was not tokenized."""
    prefix: bytes
    """The first 64 KiB of the prompt as the client sent it (text, or messages as JSON)."""
    session: str | None = None
    """The client's session id, if it sends one."""
    adapter: str | None = None
    """The adapter that it asks for; None for a base model."""
    streams: bool = True
    """Whether the answer begins as soon as the prompt is computed."""
    now: float = 0.0
    """Seconds on the monotonic clock."""
    unknown_tokens: int = 0
    """Estimated tokens of the part of the prompt whose token ids are unknown."""
    other_tokens: int = 0
    """Estimated tokens of the request's other prompts, if it has several. Everything else here is about the first one."""
    chunks: Sequence[int] = ()
    """Hashes of chunks of the prompt's bytes. Empty if all token ids are known, unless a plugin `reads_bytes`."""
    chunk_ends: Sequence[int] = ()
    """Estimated tokens from the prompt's start to the end of each chunk."""

    @property
    def whole_tokens(self) -> int:
        """Tokens of the prompt: those that are known, and an estimate of the others."""
        return (self.prompt_tokens or 0) + self.unknown_tokens


class Condition(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How fast an endpoint is, and how full its cache. None means unknown."""

    prefill_rate: float | None = None
    """Prompt tokens that it computes per second, as its answers have shown."""
    held_tokens: int | None = None
    """Tokens that its cache holds, in use or not."""
    cache_tokens: int | None = None
    """Tokens that its cache can hold."""
    evicted_per_second: float = 0.0
    """Tokens that its cache has evicted per second lately."""


UNKNOWN = Condition()


class Adapters(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The adapters that an engine has on its device, as far as its metrics show: those that it used last."""

    names: frozenset[str]
    most: int
    """How many it can have there."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One endpoint, which is a pod or a data-parallel rank of it, at the moment of the decision.

    None means unknown, which is not zero. This is a struct because a decision makes hundreds of them, and a dataclass
    takes three times as long to make.
    """

    name: str
    """The pod's name, or `pod@dp0` for a rank."""
    url: str
    rank: int | None = None
    """Data-parallel rank; None for a pod with a single cache."""
    in_flight: int = 0
    """Requests that this gateway, and the gateways that it hears, have in flight there."""
    queued_tokens: int = 0
    """Prompt tokens of those requests that the pod still has to compute, as far as the gateways know."""
    peers_in_flight: int = 0
    """How many of `in_flight` belong to other gateways."""
    foreign: int | None = None
    """Requests there that neither this gateway nor those that it hears have sent, by the engine's own count; None if that
    count is unknown, or when it was taken."""
    unseen_tokens: float = 0.0
    """Tokens that it must probably compute besides, for requests that this gateway has not heard of: those that others
    have sent since they were last heard, and those that wait in the engine's queue."""
    queue_seconds: float | None = None
    """Estimated time until the prompts of the requests in flight there are computed; None if nobody estimates it."""
    condition: Condition = UNKNOWN
    """How fast it is and how full its cache, as observed within the last moments."""
    running: int | None = None
    waiting: int | None = None
    cache_usage: float | None = None
    """The engine's own metrics: requests running, requests waiting, share of KV blocks in use (0 to 1)."""
    metrics_age: float | None = None
    """Seconds since those metrics were read, to within a tenth of a second."""
    feed: str | None = None
    """State of the pod's KV events: `complete`, or why more or less may be cached than is indexed; None without a feed."""
    trust: Trust = "none"
    engine_block: int | None = None
    """Tokens per block of the engine's cache; None until its events say it."""
    matched_blocks: int | None = None
    """Blocks from the prompt's start that the index says are held there, without a gap; None if it could not say."""
    matched_tail: int = 0
    """Tokens held beyond those blocks, up to the end of the engine block that spans the end of the last one."""
    dropped_tokens: int = 0
    """Tokens by which the engine cuts every prefix that it holds before it reuses it (speculative decoding)."""
    tiers: Sequence[int] = ()
    """How many of `matched_blocks`, from the start, are on the device, and how many are there or in the host's memory.
    Empty if the endpoint has no slower tiers."""
    pending_blocks: int = 0
    """The blocks that follow, without a gap, and that requests in flight or just finished bring there."""
    recent_blocks: int = 0
    """Blocks from the prompt's start that were sent there lately, if the index cannot say whether they are held."""
    withheld: str | None = None
    """Why it must not get the request while another endpoint can: it is ejected or busy. The scheduler removes it."""
    cached_credit: float | None = None
    """Credit for the matched and recent blocks (`matrixinfer.scheduler.credit`); None counts each of `matched_blocks` as 1."""
    recent_chunks: int = 0
    """Chunks of the prompt's bytes, from its start, that were sent there lately or are in flight."""
    guessed_tokens: int = 0
    """Estimated tokens in those chunks beyond the blocks that are known to be there. They are part of `cached_credit`."""
    adapters: Adapters | None = None
    """Its adapters, where the request asks for one; None if it does not say, or the request asks for none."""
    reuse: float = 1.0
    """Share of the predicted hits that the endpoint's answers report lately, at most 1. Credit and hits are scaled by it."""

    @property
    def pod(self) -> str:
        """Name of the pod, also if this is a rank of it."""
        return self.name if self.rank is None else EndpointName.parse(self.name).pod

    @property
    def credit(self) -> float:
        """Credit for the matched, recent and pending blocks of the prompt, in blocks."""
        credit = (
            (self.matched_blocks or 0) if self.cached_credit is None else self.cached_credit
        ) + self.pending_blocks
        return credit if self.reuse == 1.0 else credit * self.reuse

    def predicted_hit(self, prompt_tokens: int | None, block_size: int) -> int:
        """Predict how many prompt tokens the endpoint will find cached: `cached_hit`, scaled by what answers report."""
        hit = self.cached_hit(prompt_tokens, block_size)
        return hit if self.reuse == 1.0 else int(hit * self.reuse)

    def cached_hit(self, prompt_tokens: int | None, block_size: int) -> int:
        """How many prompt tokens are cached there, as far as is known: whole engine blocks, and never the last token.

        `block_size` is the size of the blocks that are counted here.
        """
        if not prompt_tokens:
            return 0
        matched = self.matched_blocks or 0
        held = matched * block_size + self.matched_tail
        if self.pending_blocks or self.recent_blocks > matched:
            held = max(matched + self.pending_blocks, self.recent_blocks) * block_size
        size = self.engine_block or block_size
        return max(0, min(held, prompt_tokens - 1) // size * size - self.dropped_tokens)

    @property
    def load(self) -> int:
        """Requests at the endpoint now: those that the gateways count, and those of others.

        The engine's own count is from the past, so what is known to have ended since must not be taken from it. Where
        nobody has told the two apart (`foreign`), it is the larger of both counts.
        """
        if self.foreign is not None:
            return self.in_flight + self.foreign
        engine = (self.running or 0) + (self.waiting or 0)
        return engine if engine > self.in_flight else self.in_flight  # noqa: FURB136  # twice as fast as max() here

    @property
    def queue_length(self) -> int | None:
        """Requests that wait in the engine's queue, as it last reported, but no more than are there now; None if unknown."""
        if self.waiting is None or self.foreign is None:
            return self.waiting
        return min(self.waiting, self.in_flight + self.foreign)


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """A scorer's answer: one value from 0 to 100 per candidate, and a note if the values need a reason."""

    values: Sequence[float]
    note: str | None = None
    expected_ms: Sequence[float] | None = None
    """One estimated time per candidate, if that is what the values are made of. It is shown to people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the scheduler lends to plugins. It undoes draws from `rng` after a dry run."""

    clock: Callable[[], float]
    rng: random.Random


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided, and everything that is needed to explain it."""

    request: SchedulingRequest
    candidates: Sequence[Candidate]
    ranked: Sequence[Candidate]
    """Best first; the others are fallbacks. Without filtered candidates. Never empty."""
    filtered: Mapping[str, str]
    """Candidate's name to the filter that removed it, and its reason."""
    scores: Mapping[str, Mapping[str, float]]
    """Scorer's name to candidate's name to score, before weights."""
    totals: Mapping[str, float]
    """Candidate's name to weighted sum of scores."""
    timings_ms: Mapping[str, float]
    """Milliseconds spent in each plugin."""
    notes: Sequence[str] = ()
    """What the decision had to do without, for people."""
    expected_ms: Mapping[str, float] = msgspec.field(default_factory=dict)
    """Candidate's name to the milliseconds that a scorer expects there; empty if none does."""

    @property
    def chosen(self) -> Candidate:
        """The best candidate."""
        return self.ranked[0]

    @property
    def attempts(self) -> Sequence[Candidate]:
        """Every pod to try, in order: first the ranked ones, then, as a last resort, those that filters removed.

        A pod with several ranks is represented by its best one, as all ranks have the same address.
        """
        best: dict[str, Candidate] = {}
        for candidate in (*self.ranked, *(each for each in self.candidates if each.name in self.filtered)):
            best.setdefault(candidate.pod, candidate)
        return list(best.values())


class Plugin(Protocol):
    """What every plugin needs.

    A class attribute `reads_bytes = True` asks for `SchedulingRequest.chunks` and `Candidate.recent_chunks` also when all
    token ids are known. With `needs_session = True` it takes no part in decisions about requests without a session.
    """

    name: ClassVar[str]
    Args: ClassVar[type[Section]]

    def __init__(self, args: Any, services: Services) -> None: ...


@runtime_checkable
class Filter(Protocol):
    """Removes candidates. If a filter would remove all of them, the scheduler ignores it for that request and says so."""

    def filter(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[str | None]:
        """Return None to keep a candidate, or the reason to remove it."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Rates candidates."""

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        """Return 0 (worst) to 100 (best) per candidate."""
        ...


@runtime_checkable
class Picker(Protocol):
    """Turns totals into a ranking."""

    def pick(
        self, request: SchedulingRequest, candidates: Sequence[Candidate], totals: Sequence[float]
    ) -> Sequence[int]:
        """Return the positions of all candidates, best first."""
        ...


@runtime_checkable
class PostSchedule(Protocol):
    """Sees each decision. The scheduler skips it in dry runs, so it is the only stage that may change a plugin's state."""

    def post_schedule(self, request: SchedulingRequest, decision: Decision) -> None:
        """See that the request goes to `decision.chosen`."""
        ...


class PluginWatch(Protocol):
    """Sees what goes wrong in plugins, also in dry runs; the scheduler itself writes no log."""

    def failed(self, plugin: str, stage: str, error: BaseException, reason: str) -> None:
        """A call raised `error`. `reason` quotes no message of foreign code, so it may be shown."""
        ...

    def slow(self, plugin: str, stage: str, seconds: float) -> None:
        """A call took longer than `scheduler.slowPluginSeconds`."""
        ...
