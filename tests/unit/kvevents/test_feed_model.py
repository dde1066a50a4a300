"""The feed between an engine that does as it likes and a transport that loses, delays and restarts."""

from collections import Counter
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.kvevents.feed import FeedState, PodFeed

from .support import CLEARED, MODEL, Follower, contents, frame, removed, stored

BLOCKS = TokenBlockProcessor(1)


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
    def __init__(self) -> None:
        super().__init__()
        self.follower = Follower(BLOCKS)
        self.feed = PodFeed(self.follower.ledger, can_replay=True)
        self.engine = Engine(0, buffered=6)
        self.unannounced = False  # the connection was broken and the feed has not been told
        self.calm = 0  # batches since it was
        self.answer: tuple[int, int, list[tuple[int, bytes]]] | None = None  # a replay under way

    @rule(wishes=st.lists(st.integers(0, 99), max_size=4), lost=st.sampled_from([False, False, False, True]))
    def publish(self, wishes: list[int], lost: bool) -> None:
        self.calm += 1
        number, payload = self.engine.publish(wishes)
        if not lost:
            self.feed.live(number, payload)

    @precondition(lambda self: self.calm >= 4)
    @rule(restarts=st.booleans(), buffered=st.sampled_from([0, 2, 6, 100]))
    def break_connection(self, restarts: bool, buffered: int) -> None:
        if restarts:
            self.engine = Engine(self.engine.run + 1, buffered)
        self.unannounced = True
        self.calm = 0

    @precondition(lambda self: self.unannounced)
    @rule()
    def notice(self) -> None:
        self.feed.disconnected()

    @precondition(lambda self: self.unannounced)
    @rule()
    def announce(self) -> None:
        self.feed.start_over()
        self.unannounced = False

    @precondition(lambda self: self.feed.replay_from is not None and self.answer is None)
    @rule(lost=st.none() | st.integers(0, 5))
    def ask(self, lost: int | None) -> None:
        start = self.feed.replay_from
        assert start is not None
        frames = [f for position, f in enumerate(self.engine.replay(start)) if position != lost]
        self.answer = (start, self.feed.epoch, frames)

    @precondition(lambda self: self.answer is not None)
    @rule(end=st.sampled_from(["whole", "whole", "broken", "given up"]))
    def hand_over(self, end: str) -> None:
        assert self.answer is not None
        start, epoch, frames = self.answer
        self.answer = None
        if (self.feed.replay_from, self.feed.epoch) != (start, epoch):
            return
        for number, payload in frames:
            self.feed.replayed(number, payload)
            if (self.feed.replay_from, self.feed.epoch) != (start, epoch):
                return
        feed = self.feed
        {"whole": feed.replay_ended, "broken": feed.replay_broke_off, "given up": feed.replay_failed}[end]()

    @precondition(lambda self: self.feed.replay_from is not None and self.answer is None)
    @rule()
    def replay_at_once(self) -> None:
        self.ask(lost=None)
        self.hand_over(end="whole")

    @property
    def caught_up(self) -> bool:
        """Nothing is under way, and the feed has seen the engine's last batch."""
        cursor = self.feed._cursor
        at_end = (cursor.next if cursor else 0) == len(self.engine.batches)
        return at_end and self.feed.replay_from is None and not self.unannounced

    @invariant()
    def a_complete_feed_knows_exactly_what_the_engine_holds(self) -> None:
        if self.caught_up and self.feed.state is FeedState.COMPLETE:
            assert contents(self.follower.index).get(MODEL, set()) == self.engine.truth()

    @invariant()
    def no_feed_claims_more_than_the_engine_holds(self) -> None:
        if self.caught_up:
            assert contents(self.follower.index).get(MODEL, set()) <= self.engine.truth()

    @invariant()
    def a_feed_that_waits_for_nothing_holds_nothing(self) -> None:
        if self.feed.replay_from is None:
            assert not self.feed._held
        assert self.feed._held_bytes == sum(len(payload) for _, payload in self.feed._held)


TestFeedMachine = FeedMachine.TestCase
TestFeedMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
