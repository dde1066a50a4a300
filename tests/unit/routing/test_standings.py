"""What is kept of an endpoint is what would be found by looking at everything again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import PodConfig, PodWatchConfig
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import MAX_MISSED_HEARTBEATS, PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.limits import HIDDEN_COMPONENTS
from matrixinfer.pods.load_reports import LoadReport
from matrixinfer.pods.registry import EngineMetrics, PodRegistry
from matrixinfer.routing.observed import Observed
from matrixinfer.routing.standings import Standings
from matrixinfer.scheduler.framework import Candidate
from matrixinfer.traffic.load import Charge, LoadLedger
from matrixinfer.traffic.peers.loads import NO_LOAD, PeerLoads
from matrixinfer.traffic.peers.message import Load
from matrixinfer.trust.cache_views import CacheView, FeedCaches
from tests.unit.kvevents.support import CLEARED, frame, stored


class World:
    """One pod, and all that may become of it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.registry = PodRegistry([self._pod()], [], PodWatchConfig(stale_after_seconds=2.0), lambda: self.now)
        self.load, self.peers = LoadLedger(lambda: self.now, 2.0), PeerLoads()
        self.observed = Observed(self.load, self.peers)
        self.feeds: dict[str, PodFeed] = {}
        self.doubted: set[str] = set()
        self.share = 1.0
        self.others = NO_LOAD
        self.seq = 0
        self.charges: list[Charge] = []
        self.follow()
        self.kept = self._standings()

    @staticmethod
    def _pod(url: str = "http://a") -> PodConfig:
        return PodConfig(name="a", url=url)

    def _standings(self) -> Standings:
        caches = FeedCaches(self.feeds, self.doubted.__contains__)
        return Standings(self.registry, caches, self.load, self.observed, lambda _: self.share)

    def follow(self) -> None:
        ledger = Ledger(pod="a", model="m", blocks=TokenBlockProcessor(16), index=MemoryIndex())
        self.feeds["a"], self.seq = PodFeed(ledger, can_replay=True), 0
        self.feeds["a"].replay_ended()

    def publish(self, *events: object) -> None:
        self.feeds["a"].live(self.seq, frame(*events))
        self.seq += 1

    def charge(self, tokens: int) -> None:
        self.charges.append(
            self.load.charge("a", "m", hashes=(), start=0, queued_tokens=tokens, prompt_tokens=tokens or 1)
        )

    def end(self, act: Callable[[Charge], None]) -> None:
        if self.charges:
            act(self.charges[0])
            if act is not Charge.first_byte:
                self.charges.pop(0)

    def measure(self, running: int, waiting: int) -> None:
        metrics = EngineMetrics(running=running, waiting=waiting, cache_usage=0.5, read_at=self.now)
        self.registry.measured("a", metrics)

    def report(self, running: int) -> None:
        report = LoadReport(
            rank=0,
            running=running,
            waiting=0,
            cache_usage=None,
            uncached_tokens=0,
            prefill_busy_seconds=0.0,
            read_at=self.now,
        )
        self.registry.published_load("a", "a", report)

    def miss_heartbeats(self) -> None:
        for _ in range(MAX_MISSED_HEARTBEATS):
            self.feeds["a"].heartbeat_missed()

    def move(self) -> None:
        """Another pod of the same name."""
        self.registry.leave("a")
        self.registry.join(self._pod("http://b"))

    def seen(self, standings: Standings) -> tuple[Candidate, CacheView | None, int]:
        (endpoint,) = self.registry.pods[0].endpoints
        standing = standings.of(endpoint, self.others, self.now)
        age = standing.candidate.metrics_age
        return replace(standing.candidate, metrics_age=None if age is None else 0.0), standing.cache, standing.waits


SLIDING: dict[str, Any] = {"group_idx": 1, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 32}
ACTS: tuple[Callable[[World, int], object], ...] = (
    lambda world, n: world.charge(n * 1_000),
    lambda world, n: world.charge(0),
    lambda world, n: world.end(Charge.first_byte),
    lambda world, n: world.end(Charge.release),
    lambda world, n: world.end(Charge.cancel),
    lambda world, n: world.measure(n, n // 2),
    lambda world, n: world.report(n),
    lambda world, n: world.publish(stored([n + 1], list(range(16)))),
    lambda world, n: world.publish(stored([n + 1], list(range(32)), block_size=32)),
    lambda world, n: world.publish(stored([n + 1], list(range(16)), medium="CPU")),
    lambda world, n: world.publish(stored([n + 1], list(range(16)), **SLIDING)),
    lambda world, n: world.publish(CLEARED),
    lambda world, n: world.feeds["a"].live(world.seq, b"no batch"),
    lambda world, n: world.feeds["a"].live(world.seq + 5, frame()),
    lambda world, n: world.feeds["a"].disconnected(),
    lambda world, n: world.feeds["a"].reconnected(),
    lambda world, n: world.miss_heartbeats(),
    lambda world, n: world.feeds["a"].suspect("rank", "words" if n else None),
    lambda world, n: world.feeds["a"].remarks.note(HIDDEN_COMPONENTS),
    lambda world, n: world.feeds["a"].remarks.reset(),
    lambda world, n: world.feeds["a"].purge(),
    lambda world, n: world.feeds["a"].start_over(),
    lambda world, n: world.feeds["a"].ledger.drop_more(),
    lambda world, n: world.feeds["a"].ledger.drop_nothing(),
    lambda world, n: world.feeds["a"].ledger.reset(),
    lambda world, n: world.feeds["a"].ledger.reuses_less(n > 2),
    lambda world, n: world.feeds.pop("a") if n == 0 else None,
    lambda world, n: world.follow(),
    lambda world, n: world.doubted.symmetric_difference_update({"a"}),
    lambda world, n: setattr(world, "share", n / 5),
    lambda world, n: setattr(world, "others", Load(n, n * 100)),
    lambda world, n: world.move(),
)
STEPS = st.lists(
    st.tuples(st.sampled_from(range(len(ACTS))), st.integers(0, 5), st.sampled_from([0.0, 0.001, 0.3, 2.5, 12.0])),
    max_size=12,
)


@given(STEPS)
@settings(max_examples=1500)
def test_what_is_kept_is_what_would_be_found(steps: list[tuple[int, int, float]]) -> None:
    world = World()
    for number, n, seconds in steps:
        if "a" not in world.feeds:
            world.follow()
        ACTS[number](world, n)
        world.seen(world.kept)  # may be kept from here
        world.now += seconds
        assert world.seen(world.kept) == world.seen(world._standings())  # noqa: SLF001


def test_nothing_is_made_again_while_nothing_changes() -> None:
    world = World()
    world.measure(1, 0)
    world.publish(stored([1], list(range(16))))
    (endpoint,) = world.registry.pods[0].endpoints
    first = world.kept.of(endpoint, NO_LOAD, world.now)
    world.now += 0.05
    assert world.kept.of(endpoint, NO_LOAD, world.now) is first
    world.charge(100)
    assert world.kept.of(endpoint, NO_LOAD, world.now).candidate.queued_tokens == 100
