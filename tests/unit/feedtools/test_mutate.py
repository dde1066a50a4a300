from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.feedtools.capture import check_capture
from matrixinfer.feedtools.capture_file import CaptureReader
from matrixinfer.feedtools.mutate import MUTATIONS
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.wire import decode
from tests.unit.kvevents.support import CLEARED, frame, removed, stored

CAPTURES = Path(__file__).parents[2] / "data" / "captures"
TOKENS = list(range(12))


@pytest.mark.parametrize(
    ("name", "mutations"),
    [
        ("bs16", "copies clear removed salt"),
        ("bs32", "copies clear removed salt"),
        ("mla-bs64-first250", "clear salt"),
        ("hybrid-full-chunked-bs16-first250", "copies clear removed salt groups"),
        ("hybrid-mla-swamla-bs64-first250", "copies removed salt groups window"),
        ("hybrid-full32-swa16-first200", "copies removed salt groups window"),
        ("v033-hybrid-full-mamba-bs64-first250", "copies clear removed salt groups"),
        ("v033-eagle-lookahead1-full-swa-bs16-first250", "copies clear removed salt groups lookahead"),
        ("sglang-p64", "clear salt"),
        ("sglang-eagle-p64", "clear salt lookahead"),
        ("sglang-hicache-wb-p1-first200", "removed salt"),
    ],
)
def test_every_mutation_makes_recorded_hits_differ(name: str, mutations: str) -> None:
    rows = list(CaptureReader(CAPTURES / f"oracle-{name}.jsonl.gz"))
    unnoticed = [
        mutation
        for mutation in mutations.split()
        if not check_capture(rows, make_ledger=MUTATIONS[mutation]).mismatches
    ]
    assert unnoticed == []


def blocks_after(mutation: str, *events: dict[str, Any]) -> tuple[int, int]:
    """Engine blocks held, as the mutated ledger and as the true one have it."""
    counts = []
    ledgers: list[Callable[..., Ledger]] = [MUTATIONS[mutation], Ledger]
    for make_ledger in ledgers:
        ledger = make_ledger(pod="a", model="m", blocks=TokenBlockProcessor(4), index=MemoryIndex())
        for event in events:
            ledger.apply(*decode(frame(event)).events)
        counts.append(len(ledger))
    return counts[0], counts[1]


def test_without_copies_one_removal_is_enough() -> None:
    twice = stored([1, 2], TOKENS[:8]), stored([2], TOKENS[4:8], parent=1)
    assert blocks_after("copies", *twice, removed([2])) == (1, 2)
    assert blocks_after("copies", *twice, removed([2]), removed([2])) == (1, 1)


def test_without_copies_places_and_clears_still_count() -> None:
    elsewhere = stored([1], TOKENS[:4], medium="CPU")
    assert blocks_after("copies", stored([1], TOKENS[:4]), elsewhere, removed([1])) == (1, 1)
    again = stored([1], TOKENS[:4]), CLEARED, stored([1], TOKENS[:4]), stored([1], TOKENS[:4])
    assert blocks_after("copies", *again, removed([1])) == (0, 1)


def test_clears_and_removals_are_ignored() -> None:
    assert blocks_after("clear", stored([1], TOKENS[:4]), CLEARED) == (1, 0)
    assert blocks_after("removed", stored([1], TOKENS[:4]), removed([1])) == (1, 0)


def test_extra_keys_are_ignored() -> None:
    index, blocks = MemoryIndex(), TokenBlockProcessor(4)
    ledger = MUTATIONS["salt"](pod="a", model="m", blocks=blocks, index=index)
    ledger.apply(*decode(frame(stored([1], TOKENS[:4], extra_keys=[["salt"]]))).events)
    assert index.count("m", blocks.chain(TOKENS[:4])) == {"a": 1}
    assert index.count("m", blocks.chain(TOKENS[:4], salt="salt")) == {}
