from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.wire import decode
from matrixinfer.kvevents.witness import Witness
from matrixinfer.sim.events import BlockStored, EventBatch, encode

SIZE = 4
IDS = list(range(100, 122))


class Engine:
    """Stores chains of blocks of four tokens."""

    def __init__(self, block_size: int) -> None:
        self.blocks = TokenBlockProcessor(block_size)
        self.ledger = Ledger(pod="p", model="m", blocks=self.blocks, index=MemoryIndex())
        self._names: dict[tuple[int, ...], int] = {}

    def stores(self, ids: Sequence[int], first: int, last: int, *, salt: str | None = None) -> None:
        """The blocks [first, last) of a prompt."""
        names = [self._name(ids, i, salt) for i in range(first, last)]
        event = BlockStored(
            block_hashes=names,
            parent_block_hash=self._name(ids, first - 1, salt) if first else None,
            token_ids=list(ids[first * SIZE : last * SIZE]),
            block_size=SIZE,
            medium="GPU",
            extra_keys=[(salt,) if salt and not i else None for i in range(first, last)],
        )
        self.ledger.apply(*decode(encode(EventBatch(0.0, [event]))).events)

    def witness(self, ids: Sequence[int], held: int) -> Witness:
        size = self.blocks.block_size
        made = Witness("m", np.array(ids, dtype=np.uint32), self.blocks.chain(ids), held=held, block_size=size)
        self.ledger.observe(made)
        return made

    def _name(self, ids: Sequence[int], block: int, salt: str | None) -> int:
        key = (hash(salt), *ids[: (block + 1) * SIZE])
        return self._names.setdefault(key, len(self._names) + 1)


def outcome(witness: Witness) -> tuple[int, int | None]:
    return witness.chains, witness.first_difference


@pytest.fixture(params=[2, 3, 4, 8, 16])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(request.param)


@pytest.mark.parametrize("held", [0, 1, 3])
def test_the_blocks_that_follow_what_was_held_are_the_prompts(engine: Engine, held: int) -> None:
    engine.stores(IDS, 0, held) if held else None
    witness = engine.witness(IDS, held * SIZE)
    engine.stores(IDS, held, 5)
    assert outcome(witness) == (1, None)


@pytest.mark.parametrize("at", [12, 13, 17])
def test_the_first_token_that_differs_is_reported(engine: Engine, at: int) -> None:
    theirs = [*IDS[:at], 7, *IDS[at:]]
    engine.stores(theirs, 0, 3)
    witness = engine.witness(IDS, 12)
    engine.stores(theirs, 3, 5)
    assert outcome(witness) == (1, at)


def test_what_is_generated_after_the_prompt_does_not_count(engine: Engine) -> None:
    witness = engine.witness(IDS, 0)
    engine.stores([*IDS, 1, 2, 3, 4], 0, 6)
    assert outcome(witness) == (1, None)


def test_blocks_that_follow_later_are_no_further_chain(engine: Engine) -> None:
    witness = engine.witness(IDS, 0)
    engine.stores(IDS, 0, 2)
    engine.stores(IDS, 2, 5)
    assert outcome(witness) == (1, None)


def test_prompts_that_begin_otherwise_are_not_seen(engine: Engine) -> None:
    other = [1, *IDS[1:]]
    late = [*IDS[:11], 1, *IDS[12:]]
    for ids in (IDS, other, late):
        engine.stores(ids, 0, 3)
    witness = engine.witness(IDS, 12)
    for ids in (other, late):
        engine.stores(ids, 3, 5)
    engine.stores(IDS, 0, 3)  # copies
    engine.stores([5, 6, 7, 8], 0, 1)
    engine.stores(IDS, 0, 3, salt="s")
    engine.stores(IDS, 3, 5, salt="s")
    assert outcome(witness) == (0, None)


def test_another_prompt_that_goes_on_from_the_same_place_is_a_second_chain(engine: Engine) -> None:
    engine.stores(IDS, 0, 3)
    witness = engine.witness(IDS, 12)
    engine.stores(IDS, 3, 4)
    engine.stores([*IDS[:12], 1, 2, 3, 4], 3, 4)
    assert witness.chains == 2
