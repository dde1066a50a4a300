"""The tracker of reuse distances, against a plain LRU stack."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.traffic.ladder.reuse import ALL, ReuseTracker


class Stack:
    """Every block ever touched, most recent last."""

    def __init__(self) -> None:
        self.blocks: list[int] = []

    def visit(self, hashes: Sequence[int], start: int) -> list[int]:
        """The distances of the known blocks from `start` on, in blocks between."""
        known = [each for each in hashes[start:] if each in self.blocks]
        found = [len(self.blocks) - 1 - self.blocks.index(each) for each in known]
        for each in reversed(hashes):
            if each in self.blocks:
                self.blocks.remove(each)
            self.blocks.append(each)
        return found


def _chain(rng: random.Random, tree: dict[tuple[int, ...], int], length: int, width: int) -> list[int]:
    """Block hashes of a prompt from a tree of prompts: equal after equal beginnings."""
    path: tuple[int, ...] = ()
    hashes = []
    for _ in range(length):
        path = (*path, int(rng.paretovariate(1.0)) % width)
        hashes.append(tree.setdefault(path, rng.randrange(ALL)))
    return hashes


def _distances(tracker: ReuseTracker, hashes: Sequence[int], start: int, now: float) -> list[int]:
    found = tracker.visit(hashes, start, len(hashes), since=now, now=now, endpoint="a")
    return [run.nearer + position for run in found.reused for position in range(run.blocks)]


@given(st.integers(0, 2**32), st.integers(1, 60))
def test_distances_are_those_of_a_stack_while_all_blocks_are_sampled(seed: int, requests: int) -> None:
    rng, tree = random.Random(seed), dict[tuple[int, ...], int]()
    tracker, stack = ReuseTracker(5_000), Stack()
    for number in range(requests):
        hashes = _chain(rng, tree, rng.randint(1, 12), rng.choice((2, 5)))
        start = rng.randint(0, len(hashes))
        now = float(number)
        assert sorted(_distances(tracker, hashes, start, now)) == sorted(stack.visit(hashes, start))
        assert len(tracker) == len(stack.blocks)
    assert tracker.rate == 1.0


@given(st.integers(0, 2**32))
def test_the_stack_survives_many_more_visits_than_it_numbers(seed: int) -> None:
    rng, tree = random.Random(seed), dict[tuple[int, ...], int]()
    tracker, stack = ReuseTracker(40), Stack()
    for number in range(300):
        hashes = _chain(rng, tree, rng.randint(1, 3), 3)
        assert sorted(_distances(tracker, hashes, 0, float(number))) == sorted(stack.visit(hashes, 0))


def test_sampled_estimates_of_a_random_stream_are_within_the_stated_error() -> None:
    rng, tree = random.Random(7), dict[tuple[int, ...], int]()
    exact, sampled = ReuseTracker(10**6), ReuseTracker(1_024)
    capacity, kept, seen, all_blocks = 20_000, [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    for number in range(6_000):
        session = int(rng.paretovariate(0.6)) % 4_000
        hashes = [tree.setdefault((session, at), rng.randrange(ALL)) for at in range(rng.randint(5, 40))]
        for which, tracker in enumerate((exact, sampled)):
            now = float(number)
            found = tracker.visit(hashes, 0, len(hashes), since=now, now=now, endpoint="a")
            all_blocks[which] += found.blocks / found.rate
            for run in found.reused:
                seen[which] += run.blocks / found.rate
                near = max(0, min(run.blocks, int(capacity * found.rate) - run.nearer))
                kept[which] += near / found.rate
    assert sampled.rate < 0.1
    assert len(sampled) <= 1_024
    for counts in (kept, seen):
        assert abs(counts[0] / all_blocks[0] - counts[1] / all_blocks[1]) < 0.04


@given(st.integers(0, 2**32), st.integers(4, 64), st.booleans())
def test_memory_is_bounded_whatever_the_hashes_are(seed: int, most: int, are_even: bool) -> None:
    rng = random.Random(seed)
    tracker = ReuseTracker(most)
    for number in range(60):
        hashes = [rng.randrange(ALL if are_even else 100_000) for _ in range(rng.randint(1, 3 * most))]
        tracker.visit(hashes, 0, len(hashes), since=0.0, now=float(number), endpoint="a")
        tracker.introduce([rng.randrange(ALL) for _ in range(8)], now=float(number), endpoint="b")
        assert len(tracker) <= most


def test_fewer_blocks_are_sampled_while_too_many_are_touched() -> None:
    rng, tree = random.Random(3), dict[tuple[int, ...], int]()
    exact, bounded = (ReuseTracker(10**6, most_touched=most) for most in (float("inf"), 1_000))
    shares = [[0.0, 0.0], [0.0, 0.0]]
    touched: list[int] = []
    for number in range(4_000):
        session = int(rng.paretovariate(0.6)) % 400
        hashes = [tree.setdefault((session, at), rng.randrange(ALL)) for at in range(rng.randint(5, 40))]
        now = number / 20
        for share, tracker in zip(shares, (exact, bounded), strict=True):
            found = tracker.visit(hashes, 0, len(hashes), since=now, now=now, endpoint="a")
            share[0] += found.blocks / found.rate
            share[1] += sum(run.blocks for run in found.reused) / found.rate
        touched.append(round(found.blocks))
    assert (exact.rate, bounded.rate) == (1.0, 0.125)
    assert sum(touched[-200:]) < 1_000  # in the last ten seconds
    assert abs(shares[0][1] / shares[0][0] - shares[1][1] / shares[1][0]) < 0.04


def test_what_nobody_has_used_for_the_horizon_goes_first() -> None:
    tracker = ReuseTracker(100, horizon=50.0)
    old, new = list(range(90)), list(range(1_000, 1_020))
    tracker.visit(old, 0, 90, since=0.0, now=0.0, endpoint="a")
    tracker.visit(new, 0, 20, since=100.0, now=100.0, endpoint="a")
    assert tracker.rate == 1.0
    assert len(tracker) == 20


def test_blocks_count_as_seen_only_if_they_were_before_the_decision() -> None:
    tracker = ReuseTracker()
    tracker.introduce([1, 2, 3], now=5.0, endpoint="a")
    assert not tracker.visit([1, 2, 3], 0, 3, since=4.0, now=6.0, endpoint="a").reused
    found = tracker.visit([1, 2, 3], 0, 3, since=7.0, now=8.0, endpoint="a")
    assert sum(run.blocks for run in found.reused) == 3


def test_models_that_share_a_cache_share_the_stack_but_no_blocks() -> None:
    tracker = ReuseTracker()
    tracker.visit([1, 2], 0, 2, since=0.0, now=0.0, endpoint="a")
    assert not tracker.visit([1, 2], 0, 2, mask=1 << 40, since=1.0, now=1.0, endpoint="a").reused
    (found,) = tracker.visit([1, 2], 0, 2, since=2.0, now=2.0, endpoint="a").reused
    assert (found.nearer, found.blocks) == (2, 2)
