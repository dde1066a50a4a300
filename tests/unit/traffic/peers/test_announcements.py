from __future__ import annotations

from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import Charge, LoadLedger
from matrixinfer.traffic.peers.announcements import AT_LEAST_EVERY_SECONDS, REPEAT_SECONDS, Outgoing
from matrixinfer.traffic.peers.message import MAX_PROMPTS, Load, Message, decode
from tests.unit.scheduler.support import FakeClock

CHAIN = [11, 12, 13]


class World:
    """A ledger and a history that tell."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.ledger = LoadLedger(self.clock, 2.0)
        self.history = RoutingHistory()
        self.outgoing = Outgoing("g")
        self.ledger.on_charge, self.history.on_sent = self.outgoing.brings, self.outgoing.holds

    def charge(self, pod: str = "a", hashes: list[int] = CHAIN, start: int = 0) -> Charge:
        return self.ledger.charge(pod, "m", hashes=hashes, start=start, queued_tokens=10)

    def message(self, after: float = 0.0) -> Message | None:
        self.clock.now += after
        load = {name: Load(*each) for name, each in self.ledger.loads().items()}
        data = self.outgoing.message(load, self.clock.now)
        return None if data is None else decode(data)

    def told(self, after: float = 0.0) -> list[tuple[str, bool, list[int]]]:
        message = self.message(after)
        return [] if message is None else [(each.endpoint, each.computed, each.blocks) for each in message.sent]


def test_something_is_told_when_it_has_changed_and_now_and_then_besides() -> None:
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


def test_a_prompt_is_told_at_once_and_again_while_it_waits() -> None:
    world = World()
    charge = world.charge(start=1)
    assert world.told() == [("a", False, CHAIN[1:])]
    assert world.told(0.9 * REPEAT_SECONDS) == []
    assert world.told(0.2 * REPEAT_SECONDS) == [("a", False, CHAIN[1:])]
    charge.first_byte()
    assert world.told(2 * REPEAT_SECONDS) == []


def test_equal_prompts_are_told_once() -> None:
    world = World()
    first, second = world.charge(), world.charge()
    world.charge("b")
    assert world.told() == [("a", False, CHAIN), ("b", False, CHAIN)]
    first.release()
    assert ("a", False, CHAIN) in world.told(REPEAT_SECONDS)  # the second one still waits
    second.release()
    assert world.told(REPEAT_SECONDS) == [("b", False, CHAIN)]


def test_a_prompt_that_was_over_before_it_was_told_is_told_once() -> None:
    world = World()
    world.charge().release()
    assert world.told() == [("a", False, CHAIN)]
    assert world.told(REPEAT_SECONDS) == []


def test_nothing_is_told_of_requests_that_bring_nothing() -> None:
    world = World()
    world.charge(start=3)
    world.charge(hashes=[])
    world.history.sent("a", "m", [])
    assert world.told() == []


def test_computed_prompts_are_told_whole_and_what_others_tell_is_not_told_on() -> None:
    world = World()
    world.history.sent("a", "m", CHAIN)
    world.history.heard("b", "m", CHAIN)
    world.ledger.add_pending("b", "m", CHAIN)
    assert world.told() == [("a", True, CHAIN)]
    assert world.told(REPEAT_SECONDS) == []


def test_at_most_so_many_prompts_wait_to_be_told() -> None:
    world = World()
    for number in range(MAX_PROMPTS + 3):
        world.charge(hashes=[number])
    assert world.outgoing.dropped == 3
    assert len(world.told()) == MAX_PROMPTS
    world.charge(hashes=[999])  # what has been told makes room
    assert world.told() == [("a", False, [999])]
    assert world.outgoing.dropped == 3


def test_what_was_lost_is_not_told_late() -> None:
    world = World()
    world.charge()
    world.message()
    world.charge("b")
    world.outgoing.lost()
    assert world.outgoing.dropped == 2
    again = world.message()
    assert again is not None
    assert (set(again.load), again.sent) == ({"a", "b"}, [])
