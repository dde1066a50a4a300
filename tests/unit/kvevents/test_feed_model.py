"""The feed between an engine that does as it likes and a transport that loses, delays and restarts."""

from collections import Counter, deque
from collections.abc import Callable
from enum import Enum
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.kvevents import feed as feed_module
from matrixinfer.kvevents.feed import FeedState, PodFeed

from .support import CLEARED, MODEL, Follower, frame, removed, stored

BLOCKS = TokenBlockProcessor(1)
WISHES = st.lists(st.integers(0, 99), max_size=4)
BUFFERED = st.sampled_from([0, 2, 6, 100])


class Link(Enum):
    UP = "up"
    BROKEN = "broken"  # nothing gets through, and the feed has not noticed
    BACK = "back"  # the feed knows that it broke, but not yet that it is back


def spoil_all(_: bytes) -> bytes:
    """No batch."""
    return b"\xc1"


def spoil_last_event(payload: bytes) -> bytes:
    """The same batch with an event at its end that cannot be read."""
    timestamp, events, rank = msgspec.msgpack.decode(payload)
    return frame(*events[:-1], ["BlockRemoved"], timestamp=timestamp, rank=rank)


def spoil_last_stored(payload: bytes) -> bytes:
    """The same batch with a BlockStored that cannot be read in place of its last, if it ends with one."""
    timestamp, events, rank = msgspec.msgpack.decode(payload)
    if not events or events[-1]["type"] != "BlockStored":
        return payload
    return frame(*events[:-1], {**events[-1], "block_size": "16"}, timestamp=timestamp, rank=rank)


class Engine:
    """Caches one-token blocks; forgets all but the last few batches."""

    def __init__(self, run: int, buffered: int) -> None:
        self.run = run
        self.buffered = buffered
        self.batches: list[bytes] = []
        self.chains: list[tuple[int, ...]] = []  # every block ever stored, as the tokens up to its end
        self.present: Counter[int] = Counter()  # copies of each

    def publish(self, wishes: list[int]) -> tuple[int, bytes]:
        """One batch that does roughly what the numbers say."""
        events = [event for wish in wishes if (event := self._do(wish)) is not None]
        self.batches.append(frame(*events, timestamp=float(self.run), rank=len(self.batches)))
        return len(self.batches) - 1, self.batches[-1]

    def replay(self, start: int) -> list[tuple[int, bytes]]:
        """What is still buffered from number `start` on."""
        first = max(start, len(self.batches) - self.buffered)
        return list(enumerate(self.batches))[first:]

    def truth(self) -> set[int]:
        """The token blocks present."""
        return {list(BLOCKS.chain(self.chains[block]))[-1] for block in +self.present}

    def _do(self, wish: int) -> dict[str, Any] | None:
        kind, pick = wish % 5, wish // 5
        present = sorted(+self.present)
        block = present[pick % len(present)] if present else None
        if kind in {0, 1}:  # a new block, at the root or after a present one
            chain = self.chains[block] if kind and block is not None else ()
            self.chains.append((*chain, self.run * 10_000 + len(self.chains)))
            return self._store(len(self.chains) - 1)
        if block is None:
            return None
        if kind == 2:
            return self._store(block)
        if kind == 3:
            leaves = [b for b in present if not any(self.chains[c][:-1] == self.chains[b] for c in present)]
            leaf = leaves[pick % len(leaves)]
            self.present[leaf] -= 1
            return removed([leaf])
        if pick % 4 == 0:
            self.present.clear()
            return CLEARED
        return None

    def _store(self, block: int) -> dict[str, Any]:
        self.present[block] += 1
        *before, token = self.chains[block]
        return stored([block], [token], parent=self.chains.index(tuple(before)) if before else None)


class FeedMachine(RuleBasedStateMachine):
    """A connection that loses, delays, breaks and comes back, an engine that restarts, and a feed that must keep up.

    No feed can notice a restart that nobody announces if the first frame to arrive has, by accident, the number that is
    expected. That is left out.
    """

    can_replay = True

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(feed_module, "MAX_HELD_FRAMES", 6)
        self.follower = Follower(BLOCKS)
        self.feed = PodFeed(self.follower.ledger, can_replay=self.can_replay)
        self.engine = Engine(0, buffered=6)
        self.link = Link.UP
        self.answer: tuple[int, list[tuple[int, bytes]]] | None = None  # a replay under way
        self.late: deque[tuple[int, bytes]] = deque()  # live frames on their way
        self.seen = 0  # batches up to which the feed has seen all, live or by a whole replay
        self.asked_at = 0  # batches that the engine had published when it answered

    def teardown(self) -> None:
        self.patch.undo()

    # The engine

    @rule(wishes=WISHES, fate=st.sampled_from(["come", "come", "come", "late", "lost"]))
    def publish(self, wishes: list[int], fate: str) -> None:
        self.engine.publish(wishes)
        if fate == "late" and self.link is Link.UP:
            self.late.append((len(self.engine.batches) - 1, self.engine.batches[-1]))
        elif fate != "lost":
            self.hear_last()

    @rule(wishes=WISHES, spoil=st.sampled_from([spoil_all, spoil_last_event, spoil_last_stored]))
    def publish_what_cannot_be_read(self, wishes: list[int], spoil: Callable[[bytes], bytes]) -> None:
        number, _ = self.engine.publish(wishes)
        self.engine.batches[number] = spoil(self.engine.batches[number])
        self.hear_last()

    @rule(seldom=st.sampled_from([False, False, False, True]))
    def publish_what_cannot_be_trusted(self, seldom: bool) -> None:
        """A page that is named by its tokens alone, as in older SGLang."""
        if seldom:
            self.engine.batches.append(frame(["BlockStored", [hash((1,))], None, [1], 1, None]))
            self.hear_last()

    def hear_last(self) -> None:
        """The last batch comes over the live connection, after those that are on their way."""
        while self.late:
            self.hear_late()
        if self.link is not Link.BROKEN:
            self.feed.live(len(self.engine.batches) - 1, self.engine.batches[-1])
            self.seen = len(self.engine.batches)

    @precondition(lambda self: self.late)
    @rule()
    def hear_late(self) -> None:
        number, payload = self.late.popleft()
        self.feed.live(number, payload)
        self.seen = max(self.seen, number + 1)

    @precondition(lambda self: self.link is Link.UP)
    @rule(first=st.integers(0, 12), buffered=BUFFERED)
    def restart_unannounced(self, first: int, buffered: int) -> None:
        """Nothing is heard of the new engine before its batch `first`."""
        while self.late:
            self.hear_late()
        while first in self._expected():
            first += 1
        self.engine, self.seen = Engine(self.engine.run + 1, buffered), 0
        for n in range(first):
            self.engine.publish([5 * n, 5 * n + 1])
        self.engine.publish([0])
        self.hear_last()

    def _expected(self) -> set[int]:
        """Numbers that the feed expects next, or may when the replay under way has come."""
        held = [number for number, _ in self.feed.queue]
        answered = [] if self.answer is None else [number for number, _ in self.answer[1]]
        return {self.feed.position or 0} | {number + 1 for number in held[-1:] + answered}

    # The connection

    @precondition(lambda self: self.link is Link.UP)
    @rule(restarts=st.booleans(), buffered=BUFFERED)
    def break_connection(self, restarts: bool, buffered: int) -> None:
        if restarts:
            self.engine, self.seen = Engine(self.engine.run + 1, buffered), 0
        self.late.clear()
        self.link = Link.BROKEN

    @precondition(lambda self: self.link is Link.BROKEN)
    @rule()
    def notice(self) -> None:
        self.feed.disconnected()
        self.link = Link.BACK

    @precondition(lambda self: self.link is Link.BACK)
    @rule()
    def announce(self) -> None:
        self.feed.reconnected()
        self.link = Link.UP

    # Replays

    @precondition(lambda self: self.feed.replay_from is not None and self.answer is None)
    @rule(lost=st.sets(st.integers(0, 5), max_size=2))
    def ask(self, lost: set[int]) -> None:
        start = self.feed.replay_from
        assert start is not None
        had = self.engine.replay(start)
        frames = [f for position, f in enumerate(had) if position not in lost]
        if not any(number >= (self.feed.position or 0) for number, _ in frames):
            frames = had  # a queue that is empty has room for something
        self.answer, self.asked_at = (self.feed.epoch, frames), len(self.engine.batches)

    @precondition(lambda self: self.answer is not None)
    @rule(end=st.sampled_from(["whole", "whole", "broken", "given up"]))
    def hand_over(self, end: str) -> None:
        assert self.answer is not None
        epoch, frames = self.answer
        self.answer = None
        feed = self.feed
        if feed.epoch != epoch:
            return
        for number, payload in frames:
            feed.replayed(number, payload)
            if feed.epoch != epoch:
                return
        {"whole": feed.replay_ended, "broken": feed.replay_broke_off, "given up": feed.replay_failed}[end]()
        if end == "whole" and not feed.backlog:
            self.seen = max(self.seen, min(self.asked_at, len(self.engine.batches)))

    @precondition(lambda self: self.feed.backlog)
    @rule()
    def catch_up(self) -> None:
        self.feed.catch_up()

    @precondition(lambda self: self.feed.given_up and self.answer is None)
    @rule()
    def try_again(self) -> None:
        self.feed.start_over()

    @precondition(lambda self: self.answer is None)
    @rule()
    def recover(self) -> None:
        """After an announced connection, replays without a fault and two more batches, nothing is left to be done.

        One more is enough but for engines that keep no history: the first looks like one of another engine.
        """
        if self.link is Link.BROKEN:
            self.notice()
        if self.link is Link.BACK:
            self.announce()
        self._replay_all()
        for _ in range(2):
            self.engine.publish([])
            self.hear_last()
            self._replay_all()
        assert self.caught_up

    def _replay_all(self) -> None:
        feed = self.feed
        for attempt in range(8):
            while feed.catch_up():
                pass
            if feed.replay_from is None:
                return
            if attempt == 4:  # an engine that keeps no history
                feed.replay_failed()
                continue
            self.ask(lost=set())
            self.hand_over(end="whole")
        raise AssertionError("the feed never has enough")

    @property
    def caught_up(self) -> bool:
        """Nothing is under way, and the feed has seen the engine's last batch."""
        at_end = (self.feed.position or 0) == len(self.engine.batches)
        return at_end and self.link is Link.UP and self.feed.replay_from is None and not self.feed.backlog

    @property
    def believes_so(self) -> bool:
        """Nothing is under way, and the feed has seen everything that happened.

        It cannot know about an engine that keeps no history and was never heard.
        """
        has_seen_all = self.seen == len(self.engine.batches) and not self.late and self.link is Link.UP
        return has_seen_all and bool(self.engine.buffered or self.feed.stats.frames)

    @invariant()
    def a_complete_feed_knows_exactly_what_the_engine_holds(self) -> None:
        if self.feed.state is FeedState.COMPLETE and (self.caught_up or self.believes_so):
            assert self.follower.index.contents().get(MODEL, set()) == self.engine.truth()

    @invariant()
    def no_feed_claims_more_than_the_engine_holds(self) -> None:
        if self.caught_up:
            assert self.feed.state is not FeedState.STALE
            assert self.follower.index.contents().get(MODEL, set()) <= self.engine.truth()

    @invariant()
    def nothing_is_claimed_for_an_untrusted_engine(self) -> None:
        if self.feed.state is FeedState.UNTRUSTED:
            assert not self.follower.index.contents()

    @invariant()
    def a_feed_whose_connection_is_down_says_so(self) -> None:
        if self.link is Link.BACK:
            assert self.feed.state in {FeedState.STALE, FeedState.UNTRUSTED}

    @invariant()
    def held_frames_are_in_order_and_bounded(self) -> None:
        numbers = [number for number, _ in self.feed.queue]
        assert numbers == sorted(set(numbers))
        assert len(numbers) <= feed_module.MAX_HELD_FRAMES + 1
        assert self.feed.queue.bytes == sum(len(payload) for _, payload in self.feed.queue)


class LiveOnlyMachine(FeedMachine):
    can_replay = False


TestFeedMachine = FeedMachine.TestCase
TestFeedMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestLiveOnlyMachine = LiveOnlyMachine.TestCase
TestLiveOnlyMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
