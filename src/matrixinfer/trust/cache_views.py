"""What is known about every endpoint's cache: from its events, or from what an agent reports in Redis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, get_args

import msgspec

from matrixinfer.index.redis.pod_states import PodState, PodStates, encode
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.pods.registry import Pod
from matrixinfer.scheduler.framework import Trust
from matrixinfer.trust.levels import trust, trust_in


class CacheView(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One endpoint's cache, according to its events. A struct, because one is made per endpoint and decision."""

    trust: Trust
    feed: str
    """State of the feed."""
    engine_block: int | None
    """Tokens per engine block; None before the first."""
    has_tails: bool
    """Engine blocks straddle token blocks, so a lookup has to ask for tails too."""
    tiers: Sequence[str]
    """The index's names of each faster tier, fastest first; empty when there is only one tier."""
    hides_salts: bool
    """The events do not say which blocks belong to a cache salt."""


class Caches(Protocol):
    """A source of cache views."""

    def of(self, name: str) -> CacheView | None:
        """What is known about an endpoint's cache now; None when nobody follows it."""
        ...


class FeedCaches:
    """Caches whose events this process follows. `doubts` says which endpoints are not to be believed now."""

    def __init__(self, feeds: Mapping[str, PodFeed], doubts: Callable[[str], bool] = lambda _: False) -> None:
        self._feeds = feeds
        self._doubts = doubts

    def of(self, name: str) -> CacheView | None:
        """The view that its feed gives."""
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
    """Caches whose events agents follow, and report in Redis.

    An endpoint that nobody reports is unknown. With `unvouched` it counts as partly known: its writer reports nothing.
    """

    def __init__(self, states: PodStates, *, unvouched: bool = False) -> None:
        self._states = states
        self._unvouched = unvouched

    def of(self, name: str) -> CacheView | None:
        """The view that its agent reported last; `stale` once that agent has fallen silent."""
        state = self._states.of(name)
        if state is None:
            return _UNVOUCHED if self._unvouched else None
        believed = _TRUST.get(state.trust, "none")
        if state.model in self._states.foreign:
            believed = "none"  # its blocks are hashed differently, so nothing would ever match
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
    """Caches that this process follows and writes into Redis, and caches that others write and report.

    `writes` says whether this process is the writer of an endpoint now, and sure of what Redis holds.
    """

    def __init__(self, own: Caches, reported: Caches, writes: Callable[[str], bool]) -> None:
        self._own = own
        self._reported = reported
        self._writes = writes

    def of(self, name: str) -> CacheView | None:
        """The view of whoever writes it now, or the last one reported."""
        return self._own.of(name) if self._writes(name) else self._reported.of(name) or self._own.of(name)


_TRUST: Mapping[str, Trust] = {level: level for level in get_args(Trust)}
_UNVOUCHED = CacheView(trust="partial", feed="unknown", engine_block=None, has_tails=False, tiers=(), hides_salts=True)


class FeedReports:
    """The state of each pod's KV events, for operators."""

    def __init__(self, feeds: Mapping[str, PodFeed], caches: Caches) -> None:
        self._feeds = feeds
        self._caches = caches

    def of(self, pod: Pod) -> dict[str, dict[str, object]]:
        """The pod's endpoints as JSON-able data; those that nobody follows are absent."""
        return {
            endpoint.name: self._report(endpoint.name, cache)
            for endpoint in pod.endpoints
            if (cache := self._caches.of(endpoint.name)) is not None
        }

    def _report(self, name: str, cache: CacheView) -> dict[str, object]:
        report: dict[str, object] = {
            "state": cache.feed,
            "trust": cache.trust,
            "hides_salts": cache.hides_salts,
            "engine_block": cache.engine_block,
        }
        feed = self._feeds.get(name)
        if feed is not None:
            report |= {"untrusted": feed.untrusted, "frames": feed.stats.frames, "engine_blocks": len(feed.ledger)}
        return report


def state_of(feed: PodFeed | None, *, doubted: bool = False) -> str | None:
    """What to report in Redis about a feed that this process follows; None without a feed."""
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
