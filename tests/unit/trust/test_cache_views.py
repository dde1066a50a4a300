from __future__ import annotations

import pytest

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import RedisConfig
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.index.redis.pod_states import PodState, PodStates, encode
from matrixinfer.index.redis.store import Store
from matrixinfer.kvevents import limits
from matrixinfer.kvevents.feed import MAX_MISSED_HEARTBEATS, PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.trust import reasons
from matrixinfer.trust.cache_views import FeedCaches
from matrixinfer.trust.shared_caches import ReportedCaches, SharedCaches, state_of


def reported(trust: str, *, alive: bool = True) -> PodStates:
    states = PodStates(Store(RedisConfig(host="127.0.0.1", port=1)), {}, clock=lambda: 100.0)
    states._states["pod-a"] = PodState(  # noqa: SLF001 - as if read from Redis
        trust=trust, feed="complete", model="m", engine_block=16, tiers=("pod-a~device",)
    )
    states._leases["pod-a"] = 100 if alive else 99  # noqa: SLF001 - as if read from Redis
    return states


@pytest.mark.parametrize(
    ("trust", "alive", "believed"),
    [
        ("exact", True, "exact"),
        ("partial", True, "partial"),
        ("exact", False, "stale"),
        ("partial", False, "stale"),
        ("none", False, "none"),
        ("of a newer version", True, "none"),
    ],
)
def test_what_an_agent_reports_is_believed_while_it_lives(trust: str, alive: bool, believed: str) -> None:
    cache = ReportedCaches(reported(trust, alive=alive)).of("pod-a")
    assert cache is not None
    assert cache.trust == believed
    assert (cache.engine_block, cache.tiers) == (16, ("pod-a~device",))


@pytest.mark.parametrize(("trust", "believed"), [("exact", "partial"), ("partial", "partial"), ("stale", "stale")])
def test_a_pod_whose_answers_report_less_again_and_again_is_not_exact(trust: str, believed: str) -> None:
    cache = ReportedCaches(reported(trust), reuses_less={"pod-a"}.__contains__).of("pod-a")
    assert cache is not None
    assert cache.trust == believed


def test_a_pod_that_nobody_reports_is_unknown_unless_writers_never_report() -> None:
    states = reported("exact")
    assert ReportedCaches(states).of("pod-b") is None
    cache = ReportedCaches(states, unvouched=True).of("pod-b")
    assert cache is not None
    assert cache.trust == "partial"


def test_what_is_reported_about_a_feed() -> None:
    assert state_of(None) is None
    ledger = Ledger(pod="pod-a", model="m", blocks=TokenBlockProcessor(16), index=MemoryIndex())
    feed = PodFeed(ledger, can_replay=False)
    assert state_of(feed) == encode(PodState(trust="partial", feed="partial", model="m", limits=(reasons.HISTORY,)))
    doubted = PodState(trust="stale", feed="partial", model="m", limits=(reasons.DOUBTED, reasons.HISTORY))
    assert state_of(feed, doubted=True) == encode(doubted)


def test_what_a_writer_reports_of_its_feed_is_said_again_by_who_reads_it() -> None:
    states = reported("partial")
    assert ReportedCaches(states).limits_of("pod-b") == (reasons.UNFOLLOWED,)
    assert ReportedCaches(states, unvouched=True).limits_of("pod-b") == (reasons.UNVOUCHED,)
    states._states["pod-a"] = PodState(  # noqa: SLF001 - as if read from Redis
        trust="partial", feed="partial", model="m", limits=(limits.ORPHANS,)
    )
    assert ReportedCaches(states).limits_of("pod-a") == [limits.ORPHANS]
    less = ReportedCaches(states, reuses_less={"pod-a"}.__contains__)
    assert less.limits_of("pod-a") == [limits.ORPHANS, limits.REUSES_LESS]
    states._leases["pod-a"] = 99  # noqa: SLF001 - as if read from Redis
    assert ReportedCaches(states).limits_of("pod-a") == [reasons.WRITER_GONE, limits.ORPHANS]
    states.foreign["m"] = {"block_size": "16"}
    assert ReportedCaches(states).limits_of("pod-a") == [reasons.OTHER_SCHEME, limits.ORPHANS]


def test_a_feed_says_why_it_is_not_exact() -> None:
    ledger = Ledger(pod="a", model="m", blocks=TokenBlockProcessor(16), index=MemoryIndex())
    feed = PodFeed(ledger, can_replay=True)
    warming: set[str] = set()
    caches = FeedCaches({"a": feed}, warming.__contains__, warming.__contains__)
    assert caches.limits_of("a") == (reasons.SYNCING,)
    feed.replay_ended()
    assert caches.limits_of("a") == ()
    for _ in range(MAX_MISSED_HEARTBEATS):
        feed.heartbeat_missed()
    assert caches.limits_of("a") == (reasons.SILENT,)
    feed.disconnected()
    assert caches.limits_of("a") == (reasons.SILENT, reasons.LOST)
    warming.add("a")
    assert caches.limits_of("a") == (reasons.WARMING, reasons.SILENT, reasons.LOST)
    ledger.hides_salts = True
    assert caches.limits_of("a")[-1] == reasons.UNTAGGED.format("salts")


def test_blocks_with_another_scheme_are_unknown_not_absent() -> None:
    states = reported("exact")
    states.foreign["m"] = {"block_size": "16"}
    cache = ReportedCaches(states).of("pod-a")
    assert cache is not None
    assert cache.trust == "none"


def test_a_shared_cache_is_believed_as_far_as_its_writer_reports() -> None:
    ledger = Ledger(pod="pod-a", model="m", blocks=TokenBlockProcessor(16), index=MemoryIndex())
    own = FeedCaches({"pod-a": PodFeed(ledger, can_replay=False)})
    mine: set[str] = set()
    shared = SharedCaches(own, ReportedCaches(reported("exact", alive=False)), mine.__contains__)
    assert shared.of("pod-a") == ReportedCaches(reported("exact", alive=False)).of("pod-a")
    mine.add("pod-a")
    assert shared.of("pod-a") == own.of("pod-a")


def test_what_is_reported_is_the_same_view_until_it_is_believed_otherwise() -> None:
    states, less = reported("exact"), set[str]()
    caches = ReportedCaches(states, reuses_less=less.__contains__)
    first = caches.of("pod-a")
    assert first is not None
    assert caches.of("pod-a") is first
    less.add("pod-a")
    believed = caches.of("pod-a")
    assert (believed and believed.trust) == "partial"
    less.clear()
    assert caches.of("pod-a") == first
    states._leases["pod-a"] = 99  # noqa: SLF001 - as if read from Redis
    believed = caches.of("pod-a")
    assert (believed and believed.trust) == "stale"
    states._states["pod-a"] = PodState(  # noqa: SLF001 - as if read from Redis
        trust="exact", feed="complete", model="m", engine_block=32
    )
    believed = caches.of("pod-a")
    assert (believed and believed.engine_block) == 32
    states._states.clear()  # noqa: SLF001 - as if read from Redis
    assert caches.of("pod-a") is None
