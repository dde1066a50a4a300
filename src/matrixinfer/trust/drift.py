"""Whether engines find in their caches what the index says that they hold, and publish what they must have stored.

Where an answer tells how many prompt tokens the engine found in its cache, that is held against what the index said of the
pod when it was chosen, or when the answer began, whichever is less: a block that was evicted while the request waited is no
fault. Fewer means that the index claims blocks that are not there: an engine that lost them and did not say so, or events
that went missing unnoticed. After a run of such answers what is indexed of the pod is cleared and its history fetched
anew; if that does not help, it is cleared and built up from what comes; each time again only after a pause twice as long,
and meanwhile the pod is doubted. Engines with several kinds of attention may well find less than their full-attention
blocks say: those are counted, and never cleared.

More than was predicted is no fault either: another gateway's requests, and blocks whose events are on their way.

Where answers do not tell, the engine's own counts of tokens looked up and found do, if less sharply: what was found between
two readings must cover what was foretold of the requests that were sent and answered in between. Where not even their
prompts have been looked up, as far as the engine has counted, it says nothing yet.

A prompt that was computed leaves its new blocks behind, and events that tell of them. After a run of requests whose last
block is still not indexed some seconds later, the feed is doubted until one is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeAlias

import structlog

from matrixinfer.kvevents.supports import Supports, Watch
from matrixinfer.telemetry.metrics import Metrics

Outcome: TypeAlias = Literal["exact", "more", "fewer", "evicted"]
Window: TypeAlias = Literal["covered", "short", "uncounted"]

RUN = 3
"""Answers in a row with fewer cached tokens than predicted after which a pod is looked at anew; and requests in a row
that stored nothing after which it is doubted."""
STORED_WITHIN_SECONDS = 5.0
"""From the end of an answer to the events that tell of the prompt's blocks."""
WINDOW_SECONDS = 5.0
"""Between two readings of an engine's hits that are held against each other."""
_FIRST_PAUSE_SECONDS = 10.0
_LONGEST_PAUSE_SECONDS = 600.0
_MAX_FORETOLD = 10_000


class Resync(Protocol):
    """Clears what is indexed of an endpoint, and has its history fetched anew (`replay`) or not."""

    def __call__(self, name: str, *, replay: bool) -> None:
        """Returns at once."""
        ...


class Lookups(NamedTuple):
    """Prompt tokens that were found in a cache, and of how many; None where that is not told."""

    hits: int
    queries: int | None


@dataclass(slots=True)
class _Endpoint:
    tells: bool = False
    """It has told of cached tokens, so that silence means none."""
    streak: int = 0
    not_before: float = float("-inf")
    pause: float = _FIRST_PAUSE_SECONDS
    replays: bool = True
    """The next time its history is fetched anew; after that it is not."""
    awaited: Callable[[], bool] | None = None
    """Whether what a request must have stored is indexed, to be asked from `awaited_until` on."""
    awaited_until: float = 0.0
    missed: int = 0
    """Requests in a row that should have stored something and did not."""
    counted: Lookups | None = None
    """The engine's own counts at the last reading."""
    counted_at: float = float("inf")
    foretold: list[tuple[float, Lookups]] = field(default_factory=list)
    """When answers began to requests sent since then, and what they must have had. Few: see `_MAX_FORETOLD`."""


class Drift:
    """Keeps account of every endpoint. `clock` gives seconds and never goes back."""

    def __init__(self, metrics: Metrics, resync: Resync, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._resync = resync
        self._clock = clock
        self._endpoints: dict[str, _Endpoint] = {}

    def __len__(self) -> int:
        """Endpoints of which account is kept."""
        return len(self._endpoints)

    def now(self) -> float:
        """The time, in seconds."""
        return self._clock()

    def doubts(self, name: str) -> bool:
        """Whether its answers have lately told otherwise than the index, or its events told nothing of its requests."""
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            return False
        if endpoint.awaited is not None and self._clock() >= endpoint.awaited_until:
            self._settle(name, endpoint, is_stored=endpoint.awaited())
        return endpoint.streak >= RUN or endpoint.missed >= RUN

    def reported(self, name: str, *, least: int, most: int, cached: int | None, purges: bool = True) -> None:
        """An answer of the endpoint tells that it found `cached` tokens in its cache; None says nothing, or none.

        The index had foretold `most` when the pod was chosen, and `least` when the answer began.
        """
        endpoint = self._of(name)
        if cached is None and not endpoint.tells:
            return
        endpoint.tells = True
        found = cached or 0
        outcome = _outcome(least, most, found)
        self._metrics.drift(name, outcome, min(max(found, least), most), found)
        if purges or outcome != "fewer":
            self._count(name, endpoint, is_fewer=outcome == "fewer")

    def began(self, name: str, *, sent_at: float, least: int, tokens: int) -> None:
        """An answer begins to a request that must have found `least` of its `tokens`."""
        endpoint = self._of(name)
        if least and sent_at >= endpoint.counted_at and len(endpoint.foretold) < _MAX_FORETOLD:
            endpoint.foretold.append((self._clock(), Lookups(least, tokens)))

    def measured(self, name: str, counted: Lookups, *, began_at: float) -> None:
        """The engine's counts since its start were read, between `began_at` and now."""
        endpoint, now = self._of(name), self._clock()
        before = endpoint.counted
        if before is not None and counted.hits >= before.hits:
            if began_at < endpoint.counted_at + WINDOW_SECONDS:
                return
            foretold = [each for at, each in endpoint.foretold if at <= began_at]
            if foretold:
                self._weigh(name, endpoint, _window(before, counted, foretold))
        endpoint.counted, endpoint.counted_at = counted, now
        endpoint.foretold.clear()

    def _weigh(self, name: str, endpoint: _Endpoint, window: Window) -> None:
        self._metrics.drift_window(name, window)
        if not endpoint.tells and window != "uncounted":
            self._count(name, endpoint, is_fewer=window == "short")

    def awaits(self, name: str, is_stored: Callable[[], bool]) -> None:
        """The endpoint has computed a prompt with a block that was not indexed. One at a time is looked after."""
        self.doubts(name)
        endpoint = self._of(name)
        if endpoint.awaited is None:
            endpoint.awaited, endpoint.awaited_until = is_stored, self._clock() + STORED_WITHIN_SECONDS

    def forget(self, name: str) -> None:
        """The endpoint is gone."""
        self._endpoints.pop(name, None)

    def _count(self, name: str, endpoint: _Endpoint, *, is_fewer: bool) -> None:
        endpoint.streak = endpoint.streak + 1 if is_fewer else 0
        if endpoint.streak >= RUN and self._clock() >= endpoint.not_before:
            self._heal(name, endpoint)

    def _of(self, name: str) -> _Endpoint:
        return self._endpoints.setdefault(name, _Endpoint())

    def _settle(self, name: str, endpoint: _Endpoint, *, is_stored: bool) -> None:
        endpoint.awaited = None
        endpoint.missed = 0 if is_stored else endpoint.missed + 1
        if endpoint.missed == RUN:
            structlog.get_logger(__name__).warning("kv_events_missing", pod=name)

    def _heal(self, name: str, endpoint: _Endpoint) -> None:
        structlog.get_logger(__name__).warning("kv_events_drift", pod=name, replay=endpoint.replays)
        self._metrics.resynced(name)
        now = self._clock()
        if now > endpoint.not_before + 10 * endpoint.pause:  # it has been good for long
            endpoint.pause, endpoint.replays = _FIRST_PAUSE_SECONDS, True
        self._resync(name, replay=endpoint.replays)
        endpoint.replays = not endpoint.replays
        endpoint.not_before = now + endpoint.pause
        endpoint.pause = min(2 * endpoint.pause, _LONGEST_PAUSE_SECONDS)
        endpoint.streak = 0


class Prediction:
    """What the index says that an endpoint will find of one prompt, in whole engine blocks.

    `tokens` of `prompt_tokens` are foretold. `held` are the token blocks, of `token_block` tokens each, that they reach
    into: of `model` in `supports`. `stored` is a further one that must be there once the prompt is computed; None for
    none. With `purges` false an answer that tells of less is only counted.
    """

    __slots__ = (
        "_at_first_byte",
        "_drift",
        "_held",
        "_model",
        "_name",
        "_prompt_tokens",
        "_purges",
        "_sent_at",
        "_stored",
        "_supports",
        "_token_block",
        "_watch",
        "tokens",
    )

    def __init__(
        self,
        drift: Drift,
        name: str,
        *,
        tokens: int,
        prompt_tokens: int,
        supports: Supports,
        model: str,
        held: Sequence[int],
        token_block: int,
        stored: int | None,
        purges: bool,
    ) -> None:
        self.tokens = self._at_first_byte = tokens
        self._prompt_tokens = prompt_tokens
        self._drift = drift
        self._name = name
        self._supports = supports
        self._model = model
        self._held = held
        self._token_block = token_block
        self._stored = stored
        self._purges = purges
        self._sent_at = drift.now()
        self._watch: Watch | None = supports.watch(held[-1]) if held else None

    def first_byte(self) -> None:
        """The answer begins: what was evicted before was not to be found any more."""
        if self._watch is not None and self._watch.gone:
            self._at_first_byte = min(self.tokens, self._supports.held(self._model, self._held) * self._token_block)
        self._unwatch()
        if self._purges:
            tokens = self._prompt_tokens
            self._drift.began(self._name, sent_at=self._sent_at, least=self._at_first_byte, tokens=tokens)

    def reported(self, cached: int | None) -> None:
        """The answer tells of `cached` tokens."""
        self._drift.reported(
            self._name, least=self._at_first_byte, most=self.tokens, cached=cached, purges=self._purges
        )

    def end(self, *, computed: bool) -> None:
        """The request is over (`computed`: the engine has answered), or tried elsewhere."""
        self._unwatch()
        stored, supports, model = self._stored, self._supports, self._model
        if computed and stored is not None:
            self._drift.awaits(self._name, lambda: supports.held(model, (stored,)) > 0)

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._supports.unwatch(self._watch)
            self._watch = None


def _outcome(least: int, most: int, cached: int) -> Outcome:
    if cached < least:
        return "fewer"
    if cached > most:
        return "more"
    return "exact" if least == most else "evicted"


def _window(before: Lookups, now: Lookups, foretold: Sequence[Lookups]) -> Window:
    """What an engine's counts say of requests that were foretold between two readings of them."""
    looked_up = None if before.queries is None or now.queries is None else now.queries - before.queries
    if looked_up is not None and looked_up < sum(each.queries or 0 for each in foretold):
        return "uncounted"
    return "short" if now.hits - before.hits < sum(each.hits for each in foretold) else "covered"
