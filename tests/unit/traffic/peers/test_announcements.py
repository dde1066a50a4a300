from __future__ import annotations

from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import Charge, LoadLedger
from matrixinfer.traffic.peers.announcements import (
    AT_LEAST_EVERY_SECONDS,
    LEAST_PAUSE_SECONDS,
    MOST_PAUSE_SECONDS,
    REPEAT_SECONDS,
    Announcements,
    pause_after,
)
from matrixinfer.traffic.peers.message import MAX_PROMPTS, Load, Message, decode
from tests.unit.scheduler.support import FakeClock

CHAIN = [11, 12, 13]


class World:
    """A ledger and a history whose prompts are announced."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.ledger = LoadLedger(self.clock, 2.0)
        self.history = RoutingHistory()
        self.announcements = Announcements("g")
        self.ledger.subscribe(self.announcements.add_in_flight)
        self.history.subscribe(self.announcements.add_computed)

    def charge(self, pod: str = "a", hashes: list[int] = CHAIN, start: int = 0) -> Charge:
        return self.ledger.charge(pod, "m", hashes=hashes, start=start, queued_tokens=10)

    def message(self, after: float = 0.0) -> Message | None:
        self.clock.now += after
        load = {name: Load(*each) for name, each in self.ledger.loads().items()}
        data = self.announcements.message(load, self.clock.now)
        return None if data is None else decode(data)

    def published(self, after: float = 0.0) -> list[tuple[str, bool, list[int]]]:
        message = self.message(after)
        return [] if message is None else [(each.endpoint, each.computed, each.blocks) for each in message.sent]


def test_a_message_is_due_after_a_change_and_at_least_every_second() -> None:
    world = World()
    first = world.message()
    assert first is not None
    assert (first.gateway, first.load, first.sent) == ("g", {}, [])
    assert world.message(0.1) is None
    charge = world.charge()
    loaded = world.message()
    assert loaded is not None
    assert loaded.load == {"a": Load(1, 10)}
    charge.first_byte()
    computed = world.message()
    assert computed is not None
    assert (computed.load, computed.sent) == ({"a": Load(1, 0)}, [])
    assert world.message(0.5 * AT_LEAST_EVERY_SECONDS) is None
    assert world.message(0.5 * AT_LEAST_EVERY_SECONDS) is not None


def test_a_prompt_is_published_at_once_and_again_until_it_is_computed() -> None:
    world = World()
    charge = world.charge(start=1)
    assert world.published() == [("a", False, CHAIN[1:])]
    assert world.published(0.9 * REPEAT_SECONDS) == []
    assert world.published(0.2 * REPEAT_SECONDS) == [("a", False, CHAIN[1:])]
    charge.first_byte()
    assert world.published(2 * REPEAT_SECONDS) == []


def test_equal_prompts_are_published_once() -> None:
    world = World()
    first, second = world.charge(), world.charge()
    world.charge("b")
    assert world.published() == [("a", False, CHAIN), ("b", False, CHAIN)]
    first.release()
    assert ("a", False, CHAIN) in world.published(REPEAT_SECONDS)  # the second request is still waiting
    second.release()
    assert world.published(REPEAT_SECONDS) == [("b", False, CHAIN)]


def test_a_prompt_that_ends_before_it_is_published_is_published_once() -> None:
    world = World()
    world.charge().release()
    assert world.published() == [("a", False, CHAIN)]
    assert world.published(REPEAT_SECONDS) == []


def test_requests_without_new_blocks_are_not_published() -> None:
    world = World()
    world.charge(start=3)
    world.charge(hashes=[])
    world.history.record_sent("a", "m", [])
    assert world.published() == []


def test_computed_prompts_are_published_in_full_and_reports_of_peers_are_not_repeated() -> None:
    world = World()
    world.history.record_sent("a", "m", CHAIN)
    world.history.record_reported("b", "m", CHAIN)
    world.ledger.add_pending("b", "m", CHAIN)
    assert world.published() == [("a", True, CHAIN)]
    assert world.published(REPEAT_SECONDS) == []


def test_the_number_of_unpublished_prompts_is_bounded() -> None:
    world = World()
    for number in range(MAX_PROMPTS + 3):
        world.charge(hashes=[number])
    assert world.announcements.dropped == 3
    assert len(world.published()) == MAX_PROMPTS
    world.charge(hashes=[999])  # published prompts make room
    assert world.published() == [("a", False, [999])]
    assert world.announcements.dropped == 3


def test_prompts_of_a_lost_connection_are_not_published_late() -> None:
    world = World()
    world.charge()
    world.message()
    world.charge("b")
    world.announcements.discard()
    assert world.announcements.dropped == 2
    again = world.message()
    assert again is not None
    assert (set(again.load), again.sent) == ({"a", "b"}, [])


def test_messages_follow_each_other_fast_unless_they_are_large_or_many_gateways_send_them() -> None:
    assert pause_after(bytes(2_000), 7) == LEAST_PAUSE_SECONDS
    assert LEAST_PAUSE_SECONDS < pause_after(bytes(50_000), 7) < pause_after(bytes(2_000), 40) < MOST_PAUSE_SECONDS
    assert pause_after(bytes(1 << 20), 63) == MOST_PAUSE_SECONDS
