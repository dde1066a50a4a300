"""Tests the load ledger, also against a naive one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.load import Charge, LoadLedger
from tests.unit.scheduler.support import FakeClock


class Untouchable(Sequence[int]):
    """A chain that must not be hashed."""

    def __len__(self) -> int:
        return 100

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: object) -> Any:
        raise AssertionError("read")


def test_a_charge_counts_until_it_is_released() -> None:
    ledger = LoadLedger(FakeClock(), 2.0)
    first = ledger.charge("a", "m", hashes=[1], start=0, queued_tokens=10)
    second = ledger.charge("a", "m", hashes=[1], start=0, queued_tokens=5)
    ledger.charge("b", "m", hashes=[], start=0, queued_tokens=1)
    assert (ledger.in_flight("a"), ledger.queued_tokens("a"), ledger.total()) == (2, 15, 3)
    first.first_byte()
    first.first_byte()
    assert (ledger.in_flight("a"), ledger.queued_tokens("a")) == (2, 5)
    first.release()
    first.release()
    first.first_byte()
    assert (ledger.in_flight("a"), ledger.queued_tokens("a")) == (1, 5)
    second.release()
    assert (ledger.in_flight("a"), ledger.queued_tokens("a"), ledger.total()) == (0, 0, 1)


def test_only_blocks_beyond_the_match_are_pending() -> None:
    ledger = LoadLedger(FakeClock(), 2.0)
    ledger.charge("a", "m", hashes=[1, 2, 3, 4], start=2, queued_tokens=0)
    assert ledger.pending("a", "m", [1, 2, 3, 4, 5], 2) == 2
    assert ledger.pending("a", "m", [1, 2, 3, 9], 2) == 1
    assert ledger.pending("a", "m", [1, 2, 3, 4], 3) == 1
    assert ledger.pending("a", "m", [1, 2, 3, 4], 0) == 0
    assert ledger.pending("a", "other", [1, 2, 3, 4], 2) == 0
    assert ledger.pending("b", "m", [1, 2, 3, 4], 2) == 0


def test_blocks_stay_pending_for_a_while_after_their_request() -> None:
    clock = FakeClock()
    ledger = LoadLedger(clock, 2.0)
    charge = ledger.charge("a", "m", hashes=[1, 2], start=0, queued_tokens=0)
    clock.now = 100.0
    charge.release()
    clock.now = 101.9
    assert ledger.pending("a", "m", [1, 2], 0) == 2
    clock.now = 102.0
    assert ledger.pending("a", "m", [1, 2], 0) == 0


def test_a_block_that_another_request_brings_does_not_fade() -> None:
    clock = FakeClock()
    ledger = LoadLedger(clock, 2.0)
    one = ledger.charge("a", "m", hashes=[1, 2], start=0, queued_tokens=0)
    ledger.charge("a", "m", hashes=[1, 3], start=0, queued_tokens=0)
    one.release()
    clock.now = 50.0
    assert ledger.pending("a", "m", [1, 2], 0) == 1


def test_blocks_that_events_report_as_gone_are_pending_no_longer() -> None:
    ledger, history, chain = LoadLedger(FakeClock(), 2.0), RoutingHistory(), [1, 2, 3, 4]
    history.watch_gone(ledger)
    ledger.charge("a", "m", hashes=chain, start=0, queued_tokens=0).release()
    history.drop("a", "other", [3, 4])
    history.drop("b", "m", [3, 4])
    assert ledger.pending("a", "m", chain, 0) == 4
    history.drop("a", "m", [3, 4])
    assert ledger.pending("a", "m", chain, 0) == 2
    assert ledger.pending("a", "m", chain, 0, whole_prompts=True) == 0  # no prompt ends there any more
    history.forget("a")
    assert ledger.pending("a", "m", chain, 0) == 0


def test_a_block_that_is_gone_stays_pending_while_a_request_brings_it_again() -> None:
    ledger = LoadLedger(FakeClock(), 2.0)
    ledger.charge("a", "m", hashes=[1, 2], start=0, queued_tokens=0).release()
    again = ledger.charge("a", "m", hashes=[1, 2], start=0, queued_tokens=0)
    ledger.gone("a", "m", [1, 2])
    assert ledger.pending("a", "m", [1, 2], 0) == 2
    again.release()
    assert ledger.pending("a", "m", [1, 2], 0) == 2
    ledger.gone("a", None, ())
    assert ledger.pending("a", "m", [1, 2], 0) == 0


def test_a_history_keeps_no_ledger_alive() -> None:
    history = RoutingHistory()
    history.watch_gone(LoadLedger(FakeClock(), 2.0))
    history.drop("a", "m", [1])
    assert not history._watches  # noqa: SLF001


def test_pending_blocks_of_peers_are_not_load_and_fade() -> None:
    clock = FakeClock()
    ledger = LoadLedger(clock, 2.0, max_pending_blocks=5)
    ledger.add_pending("a", "m", [1, 2, 3])
    assert (ledger.in_flight("a"), ledger.queued_tokens("a"), ledger.loads()) == (0, 0, {})
    assert ledger.pending("a", "m", [1, 2, 3, 4], 0) == 3
    ledger.add_pending("b", "m", [1, 2, 3])
    assert ledger.pending("b", "m", [1, 2, 3], 0) == 2
    clock.now = 1.5
    ledger.charge("a", "m", hashes=[1, 2], start=0, queued_tokens=0).release()
    clock.now = 2.0
    assert ledger.pending("a", "m", [1, 2, 3], 0) == 0
    ledger.add_pending("a", "m", [1])  # expired blocks make room
    assert ledger.pending("a", "m", [1, 2], 0) == 1
    assert len(ledger) == 1


def test_a_request_in_flight_keeps_pending_blocks_of_peers() -> None:
    clock = FakeClock()
    ledger = LoadLedger(clock, 2.0)
    charge = ledger.charge("a", "m", hashes=[1, 2], start=0, queued_tokens=0)
    ledger.add_pending("a", "m", [1, 2, 3])
    clock.now = 50.0
    assert ledger.pending("a", "m", [1, 2, 3], 0) == 2
    charge.cancel()
    assert ledger.pending("a", "m", [1, 2, 3], 0) == 0


def test_each_block_fades_at_its_own_time() -> None:
    clock = FakeClock()
    ledger = LoadLedger(clock, 2.0)
    one = ledger.charge("a", "m", hashes=[1], start=0, queued_tokens=0)
    two = ledger.charge("a", "m", hashes=[2], start=0, queued_tokens=0)
    one.release()
    clock.now = 1.0
    two.release()
    clock.now = 2.5
    assert ledger.pending("a", "m", [1], 0) == 0
    assert ledger.pending("a", "m", [2], 0) == 1


def test_a_block_brought_again_fades_after_its_last_request() -> None:
    clock = FakeClock()
    ledger = LoadLedger(clock, 2.0)
    ledger.charge("a", "m", hashes=[1], start=0, queued_tokens=0).release()
    clock.now = 1.0
    ledger.charge("a", "m", hashes=[1], start=0, queued_tokens=0).release()
    clock.now = 2.5
    ledger.charge("b", "m", hashes=[], start=0, queued_tokens=0)  # deletes the blocks of the first one
    assert ledger.pending("a", "m", [1], 0) == 1


def test_without_pending_blocks_no_hash_is_read() -> None:
    clock = FakeClock()
    ledger = LoadLedger(clock, 2.0)
    assert ledger.pending("a", "m", Untouchable(), 0) == 0
    ledger.charge("a", "m", hashes=[1], start=0, queued_tokens=0).release()
    clock.now = 5.0
    assert ledger.pending("a", "m", Untouchable(), 0) == 0
    ledger.charge("a", "m", hashes=Untouchable(), start=100, queued_tokens=0)


def test_the_bound_on_blocks_keeps_the_start_of_the_chain() -> None:
    clock = FakeClock()
    ledger = LoadLedger(clock, 2.0, max_pending_blocks=5)
    first = ledger.charge("a", "m", hashes=[1, 2, 3], start=0, queued_tokens=0)
    second = ledger.charge("b", "m", hashes=[1, 2, 3], start=0, queued_tokens=0)
    third = ledger.charge("c", "m", hashes=[1, 2, 3], start=0, queued_tokens=0)
    assert [ledger.pending(pod, "m", [1, 2, 3], 0) for pod in "abc"] == [3, 2, 0]
    assert ledger.total() == 3
    for charge in (first, second, third):
        charge.release()
    clock.now = 2.0
    ledger.charge("c", "m", hashes=[1, 2, 3], start=0, queued_tokens=0)
    assert ledger.pending("c", "m", [1, 2, 3], 0) == 3


def test_expired_blocks_are_deleted_a_few_at_a_time() -> None:
    clock = FakeClock()
    ledger = LoadLedger(clock, 2.0)
    ledger.charge("a", "m", hashes=range(1000), start=0, queued_tokens=0).release()
    clock.now = 3.0
    stored = []
    for _ in range(20):
        ledger.charge("b", "m", hashes=[], start=0, queued_tokens=0)
        stored.append(len(ledger))
    assert all(before - after <= 64 for before, after in zip([1000, *stored], stored, strict=False))
    assert stored[-1] == 0
    assert not ledger._pending  # noqa: SLF001 - nothing stays of what expired
    assert not ledger._fading  # noqa: SLF001 - nothing stays of what expired


def test_a_forgotten_pod_starts_again_while_charges_are_open() -> None:
    ledger = LoadLedger(FakeClock(), 2.0)
    old = ledger.charge("a", "m", hashes=[1], start=0, queued_tokens=3)
    ledger.forget("a")
    ledger.forget("never seen")
    assert (ledger.in_flight("a"), ledger.queued_tokens("a"), ledger.total()) == (0, 0, 0)
    assert ledger.pending("a", "m", [1], 0) == 0
    ledger.charge("a", "m", hashes=[1], start=0, queued_tokens=4)
    old.release()
    assert (ledger.in_flight("a"), ledger.queued_tokens("a")) == (1, 4)
    assert ledger.pending("a", "m", [1], 0) == 1


@dataclass
class Naive:
    """One charge in the naive ledger."""

    pod: str
    model: str
    blocks: set[int]
    queued: int
    released: float | None = None
    forgotten: bool = False
    charge: Charge = field(kw_only=True)


def chained(tokens: list[int]) -> list[int]:
    """Numbers that, like block hashes, identify everything up to their position."""
    return [int("1" + "".join(map(str, tokens[: i + 1]))) for i in range(len(tokens))]


class LedgerMachine(RuleBasedStateMachine):
    """The model keeps every charge forever and computes every answer from all of them."""

    charges = Bundle("charges")
    pods = st.sampled_from("ab")
    models = st.sampled_from("mn")
    chains = st.lists(st.integers(0, 2), max_size=6).map(chained)
    starts = st.integers(0, 6)

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.ledger = LoadLedger(self.clock, 2.0)
        self.all: list[Naive] = []

    @rule(target=charges, pod=pods, model=models, chain=chains, queued=st.integers(0, 9))
    def charge(self, pod: str, model: str, chain: list[int], queued: int) -> Naive:
        charge = self.ledger.charge(pod, model, hashes=chain, start=0, queued_tokens=queued)
        self.all.append(Naive(pod, model, set(chain), queued, charge=charge))
        return self.all[-1]

    @rule(one=charges)
    def first_byte(self, one: Naive) -> None:
        one.charge.first_byte()
        one.queued = 0

    @rule(one=charges)
    def release(self, one: Naive) -> None:
        one.charge.release()
        if one.released is None:
            one.released = self.clock.now

    @rule(one=charges)
    def cancel(self, one: Naive) -> None:
        one.charge.cancel()
        if one.released is None:
            one.released = self.clock.now
            one.blocks = set()

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(target=charges, pod=pods)
    def forget(self, pod: str) -> Any:
        self.ledger.forget(pod)
        for one in self.all:
            one.forgotten |= one.pod == pod
        return multiple()

    @rule(pod=pods, model=models, chain=chains, start=starts)
    def pending(self, pod: str, model: str, chain: list[int], start: int) -> None:
        pending = set[int]()
        for one in self._known(pod):
            if one.model == model and (one.released is None or self.clock.now < one.released + 2.0):
                pending |= one.blocks
        expected = 0
        while start + expected < len(chain) and chain[start + expected] in pending:
            expected += 1
        assert self.ledger.pending(pod, model, chain, start) == expected

    @invariant()
    def counts_agree(self) -> None:
        for pod in "ab":
            flying = [one for one in self._known(pod) if one.released is None]
            assert self.ledger.in_flight(pod) == len(flying)
            assert self.ledger.queued_tokens(pod) == sum(one.queued for one in flying)
        assert self.ledger.total() == self.ledger.in_flight("a") + self.ledger.in_flight("b")

    def teardown(self) -> None:
        for one in self.all:
            one.charge.release()
        self.clock.now += 3.0
        for _ in self.all:
            self.ledger.charge("c", "m", hashes=[], start=0, queued_tokens=0)
        assert (len(self.ledger), self.ledger._pending) == (0, {})  # noqa: SLF001 - nothing stays of what expired

    def _known(self, pod: str) -> list[Naive]:
        return [one for one in self.all if one.pod == pod and not one.forgotten]


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_cancelled_charge_leaves_nothing_behind() -> None:
    clock = FakeClock()
    ledger = LoadLedger(clock, 2.0)
    kept = ledger.charge("a", "m", hashes=[1, 2], start=0, queued_tokens=3)
    ledger.charge("a", "m", hashes=[1, 2, 3], start=0, queued_tokens=4).cancel()
    assert ledger.pending("a", "m", [1, 2, 3], 0) == 2
    assert (ledger.in_flight("a"), ledger.queued_tokens("a")) == (1, 3)
    kept.cancel()
    kept.release()
    assert ledger.pending("a", "m", [1, 2, 3], 0) == 0
    assert ledger.total() == 0


def test_chunks_are_pending_beside_blocks() -> None:
    clock = FakeClock()
    ledger, seen = LoadLedger(clock, 2.0, max_pending_blocks=5), list[tuple[list[int], int]]()
    ledger.subscribe(lambda pod, model, hashes, start, charge: seen.append((list(hashes), start)))
    charge = ledger.charge("a", "m", hashes=[1, 2], start=1, queued_tokens=3, chunks=(11, 12, 13))
    assert seen == [([1, 2], 1), ([11, 12, 13], 0)]
    assert (ledger.pending("a", "m", [1, 2], 1), ledger.pending("a", "m", [11, 12, 13, 14], 0)) == (1, 3)
    assert ledger.pending("b", "m", [11], 0) == ledger.pending("a", "n", [11], 0) == 0
    ledger.charge("a", "m", hashes=[], start=0, queued_tokens=0, chunks=(21, 22))
    assert (len(ledger), ledger.pending("a", "m", [21, 22], 0)) == (5, 1)  # the bound holds for both
    charge.release()
    assert ledger.pending("a", "m", [11, 12, 13], 0) == 3
    clock.now += 2.0
    assert ledger.pending("a", "m", [11, 12, 13], 0) == 0


def test_chunks_that_have_expired_are_deleted_as_fast_as_new_ones_come() -> None:
    clock = FakeClock()
    ledger = LoadLedger(clock, 2.0)
    for number in range(20):
        chunks = range(1000 * number, 1000 * number + 1000)
        ledger.charge("a", "m", hashes=(), start=0, queued_tokens=0, chunks=chunks).release()
        clock.now += 2.0
    assert len(ledger) <= 2000


def test_a_subscriber_is_called_for_requests_that_bring_blocks() -> None:
    ledger, seen = LoadLedger(FakeClock(), 2.0), list[tuple[str, str, list[int], int, Charge]]()
    unsubscribe = ledger.subscribe(
        lambda pod, model, hashes, start, charge: seen.append((pod, model, list(hashes), start, charge))
    )
    ledger.charge("a", "m", hashes=[1, 2], start=2, queued_tokens=0)
    charge = ledger.charge("a", "m", hashes=[1, 2], start=1, queued_tokens=0)
    assert seen == [("a", "m", [1, 2], 1, charge)]
    unsubscribe()
    ledger.charge("a", "m", hashes=[1, 2], start=0, queued_tokens=0)
    assert len(seen) == 1


def test_whole_prompts_count_up_to_where_one_ends() -> None:
    clock = FakeClock()
    ledger = LoadLedger(clock, 2.0)

    def whole(hashes: list[int], start: int = 0) -> int:
        return ledger.pending("a", "m", hashes, start, whole_prompts=True)

    short = ledger.charge("a", "m", hashes=[1, 2], start=0, queued_tokens=0)
    long = ledger.charge("a", "m", hashes=[1, 2, 3, 4], start=0, queued_tokens=0)
    again = ledger.charge("a", "m", hashes=[1, 2, 3, 4], start=2, queued_tokens=0)
    assert [whole(hashes) for hashes in ([1], [1, 2], [1, 2, 3], [1, 2, 3, 4, 5], [9])] == [0, 2, 2, 4, 0]
    assert (whole([1, 2, 3, 4], 2), whole([1, 2, 3], 2)) == (2, 0)
    short.cancel()
    assert (whole([1, 2]), ledger.pending("a", "m", [1, 2], 0)) == (0, 2)
    again.cancel()
    long.release()
    clock.now = 1.0
    assert whole([1, 2, 3, 4]) == 4
    clock.now = 3.0
    assert whole([1, 2, 3, 4]) == 0
    ledger.charge("a", "m", hashes=[], start=0, queued_tokens=0)
    assert len(ledger) == 0
