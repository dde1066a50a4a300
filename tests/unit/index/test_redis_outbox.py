"""Tests the outbox against a server that applies every change one by one."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from matrixinfer.index.redis.outbox import Change, Clear, Outbox

BOUND = 12
MODELS = ("llama", "qwen")
Server = set[tuple[str, int]]
blocks = st.lists(st.integers(0, 9), max_size=6)
models = st.sampled_from(MODELS)


def written(server: Server, taken: list[Change] | Clear) -> None:
    """Apply the taken changes to `server`."""
    if isinstance(taken, Clear):
        server.clear()
        return
    for change in taken:
        entries = {(change.model, block) for block in change.blocks}
        if change.sign == "+":
            server |= entries
        else:
            server -= entries


class OutboxMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.box = Outbox(BOUND)
        self.held: Server = set()
        self.server: Server = set()
        self.steps: list[tuple[str, Any]] = []
        """The unwritten changes, one step per block."""

    def _note(self, sign: str, model: str, changed: list[int]) -> None:
        if not self.box_overflowed:
            self.steps += [(sign, (model, block)) for block in changed]
        if sum(sign != "clear" for sign, _ in self.steps) > BOUND:
            self.steps, self.box_overflowed = [], True

    box_overflowed = False

    @rule(model=models, hashes=blocks)
    def add(self, model: str, hashes: list[int]) -> None:
        new = [block for block in dict.fromkeys(hashes) if (model, block) not in self.held]
        self.held |= {(model, block) for block in new}
        self.box.add(model, hashes)
        self._note("+", model, new)

    @rule(model=models, hashes=blocks)
    def remove(self, model: str, hashes: list[int]) -> None:
        gone = [block for block in dict.fromkeys(hashes) if (model, block) in self.held]
        self.held -= {(model, block) for block in gone}
        self.box.remove(model, hashes)
        self._note("-", model, gone)

    @rule()
    def clear(self) -> None:
        self.held.clear()
        self.box.clear()
        self.steps = [("clear", None)]

    @rule(count=st.integers(1, 8), fails=st.booleans())
    def take(self, count: int, fails: bool) -> None:
        taken = self.box.take(count)
        if taken is None:
            assert not self.steps
            return
        if isinstance(taken, Clear):
            steps: list[tuple[str, Any]] = [("clear", None)]
        else:
            steps = [(change.sign, (change.model, block)) for change in taken for block in change.blocks]
            assert 0 < len(steps) <= count
        assert steps == self.steps[: len(steps)]
        if fails:
            self.box.put_back(taken)
        else:
            del self.steps[: len(steps)]
            written(self.server, taken)

    @precondition(lambda self: self.box.overflowed)
    @rule()
    def write_again(self) -> None:
        self.box.drop()
        self.steps, self.box_overflowed = [], False
        self.server = {(model, block) for model, held in self.box.held for block in held}

    @invariant()
    def agrees(self) -> None:
        assert self.box.overflowed == self.box_overflowed
        assert {(model, block) for model, held in self.box.held for block in held} == self.held
        assert len(self.box) == len(self.held)
        assert set(self.box.models) == {model for model, _ in self.held}
        assert self.box.waiting == max(sum(sign != "clear" for sign, _ in self.steps), bool(self.steps))
        assert self.box.waiting <= BOUND

    def teardown(self) -> None:
        if self.box.overflowed:
            self.write_again()
        while (taken := self.box.take(3)) is not None:
            written(self.server, taken)
        assert self.server == self.held


TestOutbox = OutboxMachine.TestCase


@given(blocks, blocks)
def test_returned_changes_come_before_newer_ones(first: list[int], then: list[int]) -> None:
    box = Outbox(100)
    box.add("llama", first)
    taken = box.take(100)
    box.remove("llama", then)
    box.clear()
    box.add("llama", then)
    if taken is not None:
        box.put_back(taken)
    server: Server = set()
    while (taken := box.take(2)) is not None:
        written(server, taken)
    assert server == {("llama", block) for block in then}


def test_a_clear_replaces_unwritten_changes() -> None:
    box = Outbox(100)
    box.add("llama", [1, 2])
    box.clear()
    assert isinstance(box.take(10), Clear)
    assert box.take(10) is None
