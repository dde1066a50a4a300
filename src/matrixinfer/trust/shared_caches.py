"""What is known about every endpoint's cache where processes share an index in Redis: their writers report it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import get_args

from matrixinfer.index.ends import Rule
from matrixinfer.index.redis.pod_states import PodState, PodStates, encode
from matrixinfer.kvevents import limits
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.footprint import Footprint
from matrixinfer.scheduler.framework import Trust
from matrixinfer.trust import reasons
from matrixinfer.trust.cache_views import Caches, CacheView, is_plain
from matrixinfer.trust.levels import trust_in


class ReportedCaches:
    """Caches whose events agents follow, and report in Redis.

    An endpoint that nobody reports is unknown. With `unvouched` it counts as partly known: its writer reports nothing.
    `reuses_less` says whether answers have shown that an endpoint reuses less than its events say.
    """

    def __init__(
        self, states: PodStates, *, unvouched: bool = False, reuses_less: Callable[[str], bool] = lambda _: False
    ) -> None:
        self._states = states
        self._unvouched = unvouched
        self._reuses_less = reuses_less
        self._views: dict[str, tuple[PodState, CacheView]] = {}

    def rule_of(self, name: str) -> Rule | None:
        """The rule that its agent reported last."""
        state = self._states.of(name)
        return None if state is None or state.rule is None else Rule(*state.rule)

    def rules_of(self, names: Iterable[str]) -> Mapping[str, Rule]:
        """The rules that their agents reported last."""
        return {name: rule for name in names if (rule := self.rule_of(name)) is not None}

    def limits_of(self, name: str) -> Sequence[str]:
        """What its agent reported last, and what else keeps it from being believed."""
        state = self._states.of(name)
        if state is None:
            return (reasons.UNVOUCHED if self._unvouched else reasons.UNFOLLOWED,)
        words = [*state.limits]
        if state.reason is not None and state.reason not in words:
            words.insert(0, state.reason)
        if state.model in self._states.foreign:
            words.insert(0, reasons.OTHER_SCHEME)
        elif not self._states.is_alive(name):
            words.insert(0, reasons.WRITER_GONE)
        if self._reuses_less(name):
            words.append(limits.REUSES_LESS)
        return list(dict.fromkeys(words))

    def of(self, name: str) -> CacheView | None:
        """The view that its agent reported last; `stale` once that agent has fallen silent."""
        state = self._states.of(name)
        if state is None:
            return _UNVOUCHED if self._unvouched else None
        believed, kept = self._trust(name, state), self._views.get(name)
        if kept is None or kept[0] is not state or kept[1].trust != believed:
            kept = self._views[name] = state, _view(state, believed)
            if len(self._views) > len(self._states.pods):
                self._views = {each: view for each, view in self._views.items() if self._states.of(each) is not None}
        return kept[1]

    def _trust(self, name: str, state: PodState) -> Trust:
        believed = _TRUST.get(state.trust, "none")
        if state.model in self._states.foreign:
            believed = "none"  # its blocks are hashed differently, so nothing would ever match
        if believed != "none" and not self._states.is_alive(name):
            believed = "stale"
        if believed == "exact" and self._reuses_less(name):
            believed = "partial"
        return believed


class SharedCaches:
    """Caches that this process follows and writes into Redis, and caches that others write and report.

    `writes` says whether this process is the writer of an endpoint now, and sure of what Redis holds.
    """

    def __init__(self, own: Caches, reported: Caches, writes: Callable[[str], bool]) -> None:
        self._own = own
        self._reported = reported
        self._writes = writes

    def rule_of(self, name: str) -> Rule | None:
        """The rule of whoever writes it now, or the last one reported."""
        return (
            self._own.rule_of(name) if self._writes(name) else self._reported.rule_of(name) or self._own.rule_of(name)
        )

    def rules_of(self, names: Iterable[str]) -> Mapping[str, Rule]:
        """The rules of whoever writes them now, or the last ones reported."""
        return {name: rule for name in names if (rule := self.rule_of(name)) is not None}

    def limits_of(self, name: str) -> Sequence[str]:
        """The words of whoever writes it now, or the last ones reported."""
        is_own = self._writes(name) or (self._reported.of(name) is None and self._own.of(name) is not None)
        return (self._own if is_own else self._reported).limits_of(name)

    def of(self, name: str) -> CacheView | None:
        """The view of whoever writes it now, or the last one reported."""
        return self._own.of(name) if self._writes(name) else self._reported.of(name) or self._own.of(name)


_TRUST: Mapping[str, Trust] = {level: level for level in get_args(Trust)}
_UNVOUCHED = CacheView(
    trust="partial", feed="unknown", engine_block=None, has_tails=False, tiers=(), hides_salts=True, by_pod=True
)


def _view(state: PodState, believed: Trust) -> CacheView:
    rule = None if state.rule is None else Rule(*state.rule)
    return CacheView(
        trust=believed,
        feed=state.feed,
        engine_block=state.engine_block,
        has_tails=state.has_tails,
        tiers=state.tiers,
        hides_salts=state.hides_salts,
        rule=rule,
        drop=state.drop,
        footprint=None if state.footprint is None else Footprint.of(*state.footprint),
        is_plain=is_plain(believed, rule, state.tiers),
    )


def state_of(feed: PodFeed | None, *, doubted: bool = False) -> str | None:
    """What to report in Redis about a feed that this process follows; None without a feed."""
    if feed is None:
        return None
    ledger = feed.ledger
    rule = ledger.rules.rule
    return encode(
        PodState(
            trust=trust_in(feed, doubted=doubted),
            feed=feed.state.value,
            model=ledger.model,
            engine_block=ledger.block_size if rule is None else rule.unit,
            tiers=tuple(ledger.tiers.names),
            has_tails=ledger.has_tails,
            hides_salts=ledger.hides_salts,
            rule=None if rule is None else (*rule,),
            drop=0 if rule is not None else ledger.rules.drop,
            footprint=ledger.footprint.reported(),
            reason=feed.untrusted,
            limits=tuple(reasons.limits_of(feed, doubted=doubted)),
        )
    )
