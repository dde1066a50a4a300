"""What is known of every endpoint's cache, whoever follows its events: this process, or an agent that tells in Redis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, get_args

import msgspec

from matrixinfer.index.redis.pod_states import PodState, PodStates, encode
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.scheduler.framework import Trust
from matrixinfer.trust.levels import trust, trust_in


class CacheView(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One endpoint's cache, as its events tell of it. A struct, as one is made per endpoint and decision."""

    trust: Trust
    feed: str
    """State of the feed."""
    engine_block: int | None
    """Tokens per engine block; None before the first."""
    has_tails: bool
    """Engine blocks straddle token blocks, so that a look-up has to ask for tails."""
    tiers: Sequence[str]
    """The index's names of what is on each faster tier, the fastest first; none where there is but one."""
    hides_salts: bool


class Caches(Protocol):
    """Knows the caches."""

    def of(self, name: str) -> CacheView | None:
        """What is known of an endpoint's cache now; None where nobody follows it."""
        ...


class FeedCaches:
    """Caches whose events this process follows. `doubts` tells of those that are not to be believed now."""

    def __init__(self, feeds: Mapping[str, PodFeed], doubts: Callable[[str], bool] = lambda _: False) -> None:
        self._feeds = feeds
        self._doubts = doubts

    def of(self, name: str) -> CacheView | None:
        """By its feed."""
        feed = self._feeds.get(name)
        if feed is None:
            return None
        ledger, state = feed.ledger, feed.state
        return CacheView(
            trust=trust(state, silent=feed.is_silent, doubted=self._doubts(name)),
            feed=state.value,
            engine_block=ledger.block_size,
            has_tails=ledger.has_tails,
            tiers=ledger.tiers.names,
            hides_salts=ledger.hides_salts,
        )


class ReportedCaches:
    """Caches whose events agents follow, and tell of in Redis.

    A pod of which nobody tells is unknown; with `unvouched` it is taken for partly known, as of writers who tell nothing.
    """

    def __init__(self, states: PodStates, *, unvouched: bool = False) -> None:
        self._states = states
        self._unvouched = unvouched

    def of(self, name: str) -> CacheView | None:
        """By what its agent told last; `stale` when that agent is not heard of any more."""
        state = self._states.of(name)
        if state is None:
            return _UNVOUCHED if self._unvouched else None
        believed = _TRUST.get(state.trust, "none")
        if state.model in self._states.foreign:
            believed = "none"  # its blocks are made otherwise, so that nothing would ever match
        if believed != "none" and not self._states.is_alive(name):
            believed = "stale"
        return CacheView(
            trust=believed,
            feed=state.feed,
            engine_block=state.engine_block,
            has_tails=state.has_tails,
            tiers=state.tiers,
            hides_salts=state.hides_salts,
        )


class SharedCaches:
    """Caches that this process follows and writes into Redis, and those that another one writes: believed as that one tells.

    `writes` says whether this process is the writer of an endpoint now, and in no doubt of what is there.
    """

    def __init__(self, own: Caches, told: Caches, writes: Callable[[str], bool]) -> None:
        self._own = own
        self._told = told
        self._writes = writes

    def of(self, name: str) -> CacheView | None:
        """By whoever writes it; what nobody living writes is as good as what is told last."""
        return self._own.of(name) if self._writes(name) else self._told.of(name) or self._own.of(name)


_TRUST: Mapping[str, Trust] = {level: level for level in get_args(Trust)}
_UNVOUCHED = CacheView(trust="partial", feed="unknown", engine_block=None, has_tails=False, tiers=(), hides_salts=True)


def state_of(feed: PodFeed | None, *, doubted: bool = False) -> str | None:
    """What is told in Redis of a feed that this process follows."""
    if feed is None:
        return None
    ledger = feed.ledger
    return encode(
        PodState(
            trust=trust_in(feed, doubted=doubted),
            feed=feed.state.value,
            model=ledger.model,
            engine_block=ledger.block_size,
            tiers=tuple(ledger.tiers.names),
            has_tails=ledger.has_tails,
            hides_salts=ledger.hides_salts,
            reason=feed.untrusted,
        )
    )
