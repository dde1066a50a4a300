"""Attention groups against a reference that looks at every block of every prefix."""

from __future__ import annotations

import random
from functools import partial

import pytest

from matrixinfer.kvevents.groups import Group, Kind

BLOCK = 4
TREE = 40
"""Blocks of the tree of prefixes: block `n` ends after that of `PARENT[n]`."""


def tree(seed: int) -> dict[int, int | None]:
    draw = random.Random(seed)
    return {0: None} | {n: draw.choice([n - 1, n - 1, draw.randrange(n)]) for n in range(1, TREE)}


def path(parents: dict[int, int | None], block: int) -> list[int]:
    """From the root to `block`."""
    at: int | None = block
    found: list[int] = []
    while at is not None:
        found.append(at)
        at = parents[at]
    return found[::-1]


def before(parents: dict[int, int | None], block: int, tokens: int) -> int | None:
    at: int | None = block
    for _ in range(tokens // BLOCK):
        at = None if at is None else parents[at]
    return at


def is_held(kind: Kind, span: int | None, held: dict[int, int], blocks: list[int]) -> bool:
    """The rule, said of all blocks of a prefix."""
    end = len(blocks) * BLOCK
    if kind is Kind.FULL:
        needed = blocks
    elif kind is Kind.MAMBA:
        needed = blocks[-1:]
    elif kind is Kind.SLIDING:
        assert span is not None
        count = -(-(span - 1) // BLOCK)
        needed = blocks[-count:] if count else []
    else:
        assert span is not None
        needed = blocks[end // span * span // BLOCK :]
    return all(block in held for block in needed)


@pytest.mark.parametrize(
    ("kind", "span"),
    [
        (Kind.FULL, None),
        (Kind.MAMBA, None),
        *((Kind.SLIDING, span) for span in (1, 2, 5, 6, 17, 1000)),
        *((Kind.CHUNKED, span) for span in (4, 8, 32)),
    ],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_what_a_group_holds_is_what_the_rule_says_after_any_schedule(
    kind: Kind, span: int | None, sparse: bool
) -> None:
    for seed in range(8):
        draw = random.Random(seed)
        parents = tree(seed)
        group = Group(kind, BLOCK, span, partial(before, parents))
        held: dict[int, int] = {}
        reported: dict[int, bool] = {}
        for _ in range(120):
            changed: list[int] = []
            block = draw.randrange(TREE)
            if held and draw.random() < 0.45:
                block = draw.choice(list(held))
                held[block] -= 1
                if not held[block]:
                    del held[block]
                changed += group.remove([block])
            else:
                stored = path(parents, block)[-draw.randrange(1, 6) :]
                for each in stored:
                    held[each] = held.get(each, 0) + 1
                changed += group.add(stored, None if sparse else parents[stored[0]])
            for each in range(TREE):
                expected = is_held(kind, span, held, path(parents, each))
                assert group.holds(each, len(path(parents, each)) * BLOCK) is expected, (seed, each)
                if reported.get(each, False) != expected and group.needed(len(path(parents, each)) * BLOCK):
                    assert each in changed or not reported, (seed, each)
                reported[each] = expected


def test_removing_what_is_not_held_changes_nothing() -> None:
    group = Group(Kind.SLIDING, BLOCK, 8, lambda block, tokens: None)
    assert list(group.remove([1, 2])) == []
    assert len(group) == 0


def test_a_block_that_is_linked_late_is_counted_again() -> None:
    known: dict[int, int] = {}
    group = Group(Kind.SLIDING, BLOCK, 9, lambda block, tokens: known.get(block) if tokens == BLOCK else None)
    list(group.add([1], None))
    list(group.add([2], None))
    assert not group.holds(2, 2 * BLOCK)
    known[2] = 1
    assert list(group.known(2)) == [2]
    assert group.holds(2, 2 * BLOCK)


def test_links_of_what_is_gone_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matrixinfer.kvevents.groups._MAX_RETIRED", 10)
    group = Group(Kind.FULL, BLOCK, None, lambda block, tokens: None)
    for start in range(0, 1000, 10):
        list(group.add(range(start, start + 10), start - 1 if start else None))
        list(group.remove(range(start, start + 10)))
    assert group.memory_bytes <= 100 * 22
    group.clear()
    assert group.memory_bytes == 100 * 10


def test_blocks_that_follow_themselves_are_refused() -> None:
    group = Group(Kind.SLIDING, BLOCK, 99, lambda block, tokens: None)
    with pytest.raises(ValueError, match="follows itself"):
        list(group.add([1, 2, 1], 2))


def test_a_long_prefix_whose_blocks_came_last_first_is_linked_again_when_the_size_changes() -> None:
    blocks = 4_000
    known: set[int] = set()

    def earlier(block: int, tokens: int) -> int | None:
        at = block - tokens // BLOCK
        return at if block in known and at >= 0 else None

    group = Group(Kind.FULL, BLOCK, None, earlier)
    for block in reversed(range(blocks)):
        list(group.add([block], None))
    known.update(range(blocks))
    list(group.resize(2 * BLOCK))
    assert group.holds(blocks - 1, blocks * BLOCK)
    list(group.remove([1]))
    assert not group.holds(blocks - 1, blocks * BLOCK)


@pytest.mark.parametrize("kind", [Kind.FULL, Kind.SLIDING])
def test_blocks_stored_last_first_are_counted_in_linear_time(kind: Kind) -> None:
    blocks = 20_000
    group = Group(kind, BLOCK, 8 * BLOCK, lambda block, tokens: block - tokens // BLOCK)
    visits = 0
    for block in reversed(range(1, blocks)):
        visits += sum(1 for _ in group.add([block], block - 1))
    assert visits <= 20 * blocks
    list(group.add([0], None))
    assert group.holds(blocks - 1, blocks * BLOCK)
    list(group.remove([5]))
    assert not group.holds(blocks - 1, blocks * BLOCK) or kind is Kind.SLIDING


def test_a_block_is_counted_again_when_one_before_it_is_linked_late() -> None:
    known: dict[tuple[int, int], int] = {}
    group = Group(Kind.SLIDING, BLOCK, 4 * BLOCK, lambda block, tokens: known.get((block, tokens)))
    for block in (1, 2, 3):
        list(group.add([block], None, linked=False))
    known[3, BLOCK] = 2
    list(group.known(3))
    assert not group.holds(3, 3 * BLOCK)
    known[2, BLOCK] = 1  # shown by what ends with block 3, so that alone is looked at again
    assert 3 in list(group.known(3))
    assert group.holds(3, 3 * BLOCK)
