from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.blocks import TokenBlockProcessor, TokenIds
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.wire import decode
from matrixinfer.kvevents.witness import Witness
from matrixinfer.sim.events import BlockStored, EventBatch, encode
from matrixinfer.trust.sampling import Outcome, Present, Sample, Sampling

SIZE = 4


class World:
    """One endpoint: requests come and go, and the engine publishes the blocks that it stores."""

    def __init__(self) -> None:
        self.now = 0.0
        self.blocks = TokenBlockProcessor(SIZE)
        self.judged: list[tuple[Outcome, int | None]] = []
        self.sampling = Sampling(lambda: self.now, lambda sample: self.judged.append(sample.outcome()))
        self._names: dict[tuple[int, ...], int] = {}
        self.feed = self.made()

    def made(self) -> PodFeed:
        return PodFeed(Ledger(pod="p", model="m", blocks=self.blocks, index=MemoryIndex()), can_replay=True)

    def enter(self, ids: Sequence[int] | None, model: str = "m") -> Present:
        return self.sampling.enter(self.feed, model, None if ids is None else array(ids))

    def watch(self, ids: Sequence[int], own: Present, *, held: int = 0) -> Sample | None:
        witness = Witness("m", array(ids), self.blocks.chain(array(ids)), held=held, block_size=SIZE)
        return self.sampling.watch(
            self.feed, witness, own, model="m", request_class="text", pod="p", path="/v1/completions"
        )

    def sampled(self, ids: Sequence[int], *, held: int = 0) -> Sample:
        self.own = self.enter(ids)
        sample = self.watch(ids, self.own, held=held)
        assert sample is not None
        return sample

    def stores(self, ids: Sequence[int]) -> None:
        """The engine stores the whole blocks of a prompt that it does not hold."""
        held = set(self._names.values())
        names = [self._names.setdefault(tuple(ids[: end + SIZE]), len(self._names) + 1) for end in starts(ids)]
        first = sum(name in held for name in names)
        if first == len(names):
            return
        event = BlockStored(
            block_hashes=names[first:],
            parent_block_hash=names[first - 1] if first else None,
            token_ids=list(ids[first * SIZE : len(names) * SIZE]),
            block_size=SIZE,
            medium="GPU",
            extra_keys=None,
        )
        self.feed.ledger.apply(*decode(encode(EventBatch(0.0, [event]))).events)

    def ends(self, sample: Sample, *, computed: bool = True) -> tuple[Outcome, int | None]:
        self.sampling.leave(self.own)
        self.sampling.finished(sample, computed=computed)
        self.now += 2.0
        self.sampling.settle()
        return self.judged[-1]


def array(ids: Sequence[int]) -> TokenIds:
    return np.array(ids, dtype=np.uint32)


def starts(ids: Sequence[int]) -> range:
    return range(0, len(ids) - SIZE + 1, SIZE)


def prompt(first: int, *, rest: int = 0, count: int = 16) -> list[int]:
    return [first, *range(rest + 1, rest + count)]


OURS, OTHER = prompt(1000), prompt(2000)


@pytest.fixture
def world() -> World:
    return World()


def test_a_chain_with_our_ids_agrees_and_one_with_others_differs(world: World) -> None:
    sample = world.sampled(OURS)
    world.stores([*OURS, 7, 7, 7, 7])
    assert world.ends(sample) == ("agrees", None)
    strange = world.sampled(OTHER)
    world.stores([*OTHER[:9], 5, *OTHER[9:]])
    assert world.ends(strange) == ("differs", 9)


def test_no_chain_proves_nothing(world: World) -> None:
    assert world.ends(world.sampled(OURS)) == ("inconclusive", None)


def test_a_request_that_was_not_computed_proves_nothing(world: World) -> None:
    sample = world.sampled(OURS)
    world.stores(OTHER)
    assert world.ends(sample, computed=False) == ("inconclusive", None)


def test_a_feed_that_started_over_meanwhile_proves_nothing(world: World) -> None:
    sample = world.sampled(OURS)
    world.stores(OTHER)
    world.feed.start_over()
    assert world.ends(sample) == ("inconclusive", None)


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_chain_of_another_request_is_not_held_against_the_sample(world: World, ended: bool, late: bool) -> None:
    """It was in flight already, has just ended, or came while the sample was looked for."""
    other = None if late else world.enter(OTHER)
    if ended and other is not None:
        world.sampling.leave(other)
    sample = world.sampled(OURS)
    other = other or world.enter(OTHER)
    world.stores(OTHER)
    assert world.ends(sample) == ("inconclusive", None)


def test_a_request_whose_events_must_have_come_explains_nothing(world: World) -> None:
    world.sampling.leave(world.enter(OTHER))
    world.now += 2.0
    sample = world.sampled(OURS)
    world.stores(OTHER)
    assert world.ends(sample) == ("differs", 0)


def test_our_own_chain_is_found_among_others(world: World) -> None:
    world.enter(OTHER)
    world.enter(None)
    sample = world.sampled(OURS)
    for ids in (OTHER, prompt(3000), OURS):
        world.stores(ids)
    assert world.ends(sample) == ("agrees", None)


def test_an_engine_that_renders_all_requests_differently_is_caught_among_many(world: World) -> None:
    others = [prompt(2000 + i) for i in range(5)]
    for each in others:
        world.enter(each)
    sample = world.sampled(OURS)
    for each in (*others[:3], OURS, *others[3:]):
        world.stores([*each[:6], 5, *each[6:]])
    assert world.ends(sample) == ("differs", 6)


@pytest.mark.parametrize(
    ("other", "outcome"), [(OTHER, ("differs", 0)), ([*OURS[:8], 1, 2, 3], ("inconclusive", None))]
)
def test_a_strange_chain_is_ours_if_nobody_brought_more_of_our_prompt(
    world: World, other: list[int], outcome: tuple[Outcome, int | None]
) -> None:
    """The other request's own chain has not come."""
    world.enter(other)
    sample = world.sampled(OURS)
    world.stores(prompt(3000))
    assert world.ends(sample) == outcome


def test_our_own_chain_is_found_among_more_than_are_kept(world: World) -> None:
    sample = world.sampled(OURS)
    for head in range(100):
        world.stores(prompt(3000 + head))
    world.stores(OURS)
    assert len(sample.witness.strange) == 64
    assert world.ends(sample) == ("agrees", None)


@pytest.mark.parametrize("unknown", [None, OURS])
def test_a_request_that_may_be_confused_with_the_sample_ends_in_doubt(world: World, unknown: list[int] | None) -> None:
    """Its ids are not known, or are the same."""
    world.enter(unknown)
    sample = world.sampled(OURS)
    world.stores(OURS if unknown else prompt(3000))
    assert world.ends(sample) == ("inconclusive", None)


def test_requests_of_other_models_and_from_other_places_explain_nothing(world: World) -> None:
    world.stores(OURS[:8])
    world.enter(OTHER, model="adapter")
    world.enter(OTHER)
    sample = world.sampled(OURS, held=8)
    world.stores([*OURS[:10], 5, *OURS[10:]])
    assert world.ends(sample) == ("differs", 10)


def test_one_sample_at_a_time_is_looked_for_at_an_endpoint(world: World) -> None:
    sample = world.sampled(OURS)
    assert not world.sampling.can_watch(world.feed)
    assert world.watch(OTHER, world.enter(OTHER)) is None
    world.sampling.finished(sample, computed=True)
    world.now += 0.5
    assert not world.sampling.can_watch(world.feed)
    assert world.feed.ledger.is_observed
    world.now += 1.0
    assert world.sampling.can_watch(world.feed)
    assert not world.feed.ledger.is_observed


def test_samples_and_requests_noted_are_bounded(world: World) -> None:
    for _ in range(100):
        world.feed = world.made()
        world.watch(OURS, world.enter(OURS))
    assert len(world.sampling) == 64
    world.feed = world.made()
    crowd = [world.enter(prompt(i)) for i in range(1000)]
    world.sampling.finished(next(iter(world.sampling._samples.values())), computed=True)  # noqa: SLF001 - makes room
    world.now += 2.0
    sample = world.sampled(OURS)
    assert len(sample.rivals) == 256
    world.stores(prompt(999))  # of a request that was not noted
    assert world.ends(sample) == ("inconclusive", None)
    for entry in crowd:
        world.sampling.leave(entry)
    world.now += 2.0
    world.sampling.forget_gone()
    assert world.feed not in world.sampling._present  # noqa: SLF001 - no public view shows what is forgotten


HEADS = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(HEADS, st.integers(0, 5), st.randoms(use_true_random=False), st.booleans())
def test_an_engine_with_our_ids_is_never_said_to_differ(
    heads: list[int], which: int, random: object, leaves: bool
) -> None:
    """Whatever requests there are, and in whatever order their blocks come: prompts here share beginnings and ends."""
    assert hasattr(random, "shuffle")
    world = World()
    prompts = [prompt(head // 2, rest=100 * (head % 2), count=12) for head in heads]
    entries = [world.enter(each) for each in prompts[:which]]
    ours = prompts[min(which, len(prompts) - 1)]
    sample = world.sampled(ours)
    entries += [world.enter(each) for each in prompts[which + 1 :]]
    for entry in entries if leaves else ():
        world.sampling.leave(entry)
    order = list({tuple(each): each for each in (*prompts, ours)}.values())
    random.shuffle(order)
    for each in order:
        world.stores(each)
    assert world.ends(sample)[0] != "differs"
