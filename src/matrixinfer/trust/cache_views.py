"""What is known about every endpoint's cache. `trust.shared_caches` adds what other processes report in Redis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol
from weakref import ref

import msgspec

from matrixinfer.index.ends import Rule
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.footprint import Footprint
from matrixinfer.pods.registry import Pod
from matrixinfer.scheduler.framework import Trust
from matrixinfer.trust import reasons
from matrixinfer.trust.levels import trust


class CacheView(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One endpoint's cache, according to its events."""

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
    rule: Rule | None = None
    """How its reusable prefixes are found; None where every prefix that it holds is reused."""
    drop: int = 0
    """Tokens by which the engine cuts every prefix that it holds before it reuses it."""
    by_pod: bool = False
    """Its writer may not tell ranks apart: what the index lists under the pod's name counts for each of its ranks."""
    footprint: Footprint | None = None
    """How full it is, as known now; None where another process follows its events."""
    is_plain: bool = False
    """Its events say all that it holds, in blocks of one kind on one tier, and it reuses every prefix of that."""


def is_plain(believed: Trust, rule: Rule | None, tiers: Sequence[str]) -> bool:
    """The value of `CacheView.is_plain`."""
    return believed == "exact" and rule is None and not tiers


class Caches(Protocol):
    """A source of cache views."""

    def of(self, name: str) -> CacheView | None:
        """What is known about an endpoint's cache now; None when nobody follows it. The same object while nothing changes."""
        ...

    def rule_of(self, name: str) -> Rule | None:
        """`CacheView.rule` of an endpoint, at less cost."""
        ...

    def rules_of(self, names: Iterable[str]) -> Mapping[str, Rule]:
        """Those of these endpoints that have a rule."""
        ...

    def limits_of(self, name: str) -> Sequence[str]:
        """What its events cannot tell, and why they are not believed exactly, in words. Empty where trust is exact."""
        ...


class FeedCaches:
    """Caches whose events this process follows.

    `doubts` says which endpoints are not to be believed now, and `is_warming` for which of them that is so because their
    blocks come from Redis, until their own events say more.
    """

    def __init__(
        self,
        feeds: Mapping[str, PodFeed],
        doubts: Callable[[str], bool] = lambda _: False,
        is_warming: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._feeds = feeds
        self._doubts = doubts
        self._is_warming = is_warming
        self._views: dict[str, _Kept] = {}

    @property
    def names(self) -> Collection[str]:
        """The endpoints that are followed."""
        return self._feeds.keys()

    def rule_of(self, name: str) -> Rule | None:
        """The rule that its feed gives."""
        feed = self._feeds.get(name)
        return None if feed is None else feed.ledger.rules.rule

    def rules_of(self, names: Iterable[str]) -> Mapping[str, Rule]:
        """The rules that their feeds give."""
        feeds = self._feeds
        return {
            name: rule
            for name in names
            if (feed := feeds.get(name)) is not None and (rule := feed.ledger.rules.rule) is not None
        }

    def limits_of(self, name: str) -> Sequence[str]:
        """The words of its feed."""
        feed, warms = self._feeds.get(name), self._is_warming(name)
        if feed is None and not warms:
            return reasons.NOT_FOLLOWED
        words = reasons.limits_of(feed, doubted=self._doubts(name) and not warms)
        return (reasons.WARMING, *words) if warms else words

    def of(self, name: str) -> CacheView | None:
        """The view that its feed gives. Every decision asks for all, so one is made only when something has changed."""
        feed = self._feeds.get(name)
        if feed is None:
            return None
        kept, doubted = self._views.get(name), self._doubts(name)
        if (
            kept is None
            or kept.feed() is not feed
            or kept.changes != feed.changes
            or kept.ledger_changes != feed.ledger.changes
            or kept.doubted is not doubted
            or kept.remarks is not feed.remarks.words
        ):
            kept = self._views[name] = _Kept(feed, doubted)
            if len(self._views) > len(self._feeds):
                self._views = {each: view for each, view in self._views.items() if each in self._feeds}
        return kept.view


class _Kept:
    """A view, and what it rests on."""

    __slots__ = ("changes", "doubted", "feed", "ledger_changes", "remarks", "view")

    def __init__(self, feed: PodFeed, doubted: bool) -> None:
        self.feed = ref(feed)
        self.doubted = doubted
        self.changes, self.ledger_changes, self.remarks = feed.changes, feed.ledger.changes, feed.remarks.words
        self.view = _view(feed, doubted)


def _view(feed: PodFeed, doubted: bool) -> CacheView:
    ledger, state = feed.ledger, feed.state
    rule, tiers = ledger.rules.rule, ledger.tiers.names
    believed = trust(state, silent=feed.is_silent, doubted=doubted)
    return CacheView(
        trust=believed,
        feed=state.value,
        engine_block=ledger.block_size if rule is None else rule.unit,
        has_tails=ledger.has_tails,
        tiers=tiers,
        hides_salts=ledger.hides_salts,
        rule=rule,
        drop=0 if rule is not None else ledger.rules.drop,
        footprint=ledger.footprint,
        is_plain=is_plain(believed, rule, tiers),
    )


class FeedReports:
    """The state of each pod's KV events, for operators. `reuse` gives the share of predicted hits that answers report."""

    def __init__(
        self, feeds: Mapping[str, PodFeed], caches: Caches, reuse: Callable[[str], float] = lambda _: 1.0
    ) -> None:
        self._feeds = feeds
        self._caches = caches
        self._reuse = reuse

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
            "reuse_unit": cache.engine_block if cache.rule is None else cache.rule.unit,
            "drop_tokens": cache.drop if cache.rule is None else cache.rule.drop,
            "reuse": round(self._reuse(name), 3),
            "limits": list(self._caches.limits_of(name)),
        }
        feed = self._feeds.get(name)
        if feed is not None:
            report |= {
                "untrusted": feed.untrusted,
                "frames": feed.stats.frames,
                "engine_blocks": len(feed.ledger),
            }
        return report
