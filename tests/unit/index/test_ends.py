from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.blocks import ROOT, BlockChain, TokenBlockProcessor, salt_parent, token_bytes
from matrixinfer.index.ends import _MAX_ROUNDS, Question, Rule, search
from matrixinfer.index.memory import MemoryIndex

MODEL = "llama"
Prompt = tuple[int, ...]


@dataclass
class Fleet:
    """Endpoints with marks, and what the marks say, in plain form."""

    blocks: TokenBlockProcessor
    ahead: int
    index: MemoryIndex = field(default_factory=MemoryIndex)
    marked: dict[str, set[tuple[str | None, Prompt, Prompt]]] = field(default_factory=dict)
    """Reusable prefixes by name of ends: salt, the prefix, and the tokens after it that decide as well."""

    def mark(self, name: str, prompt: Prompt, end: int, salt: str | None) -> None:
        """The endpoint can reuse the first `end` tokens of a prompt. It holds all blocks before that place."""
        chain = self.blocks.chain(prompt, salt=salt)
        before = (end - 1) // self.blocks.block_size
        key = chain[before - 1] if before else ROOT if salt is None else salt_parent(salt)
        last, ahead = prompt[before * self.blocks.block_size : end], prompt[end : end + self.ahead]
        self.index.add(MODEL, name, [key, self.blocks.end(key, token_bytes(last), token_bytes(ahead))], None)
        self.index.add(MODEL, name.removesuffix("~ends"), chain[:before], None)
        self.marked.setdefault(name, set()).add((salt, prompt[:end], ahead))

    def longest(self, prompt: Prompt, salt: str | None, *, limit: int, drop: int) -> dict[str, int]:
        """The reference: try every mark."""
        found = {}
        for name, marks in self.marked.items():
            reused = [
                len(prefix) - drop
                for of_salt, prefix, ahead in marks
                if of_salt == salt and len(prefix) <= limit and prompt[: len(prefix) + self.ahead] == prefix + ahead
            ]
            if reused:
                found[name] = max(reused)
        return found

    def search(
        self, names: Collection[str], chain: BlockChain, *, limit: int, unit: int, drop: int = 0, rooted: bool = True
    ) -> tuple[dict[str, int], int]:
        """What `search` finds, and how many questions it asks."""
        matched = self.index.count(MODEL, chain)
        blocks = max((matched.get(name.removesuffix("~ends"), 0) for name in names), default=0)
        rule = Rule(unit=unit, ahead=self.ahead, reserve=0, drop=drop, is_rooted=rooted)
        asking = search(names, chain, rule, tokens=limit + self.ahead, blocks=blocks)
        return self.answered(asking)

    def answered(self, asking: Generator[Question, Mapping[str, int], dict[str, int]]) -> tuple[dict[str, int], int]:
        """The result of a search that the index answers, and how many questions it asks."""
        questions = 0
        try:
            question = next(asking)
            while True:
                questions += 1
                question = asking.send(self.index.last_of(MODEL, *question))
        except StopIteration as done:
            found: dict[str, int] = done.value
            return found, questions


NAMES = ("a~ends", "b@dp1~ends", "c~ends")
salts = st.sampled_from([None, None, None, "tenant"])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Fleet, Prompt, str | None, int, int, int]:
    """Endpoints with marks, and a question: prompt, salt, limit, unit and drop."""
    block_size, unit = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    fleet = Fleet(TokenBlockProcessor(block_size), draw(st.integers(0, 2)))
    drop = draw(st.sampled_from([0, 0, 1, unit, block_size]))
    stem = tuple(draw(st.lists(st.integers(0, 1), min_size=8, max_size=40)))
    prompts: list[Prompt] = [stem]
    for _ in range(draw(st.integers(0, 3))):  # all begin alike, and part somewhere
        cut = draw(st.integers(0, len(stem)))
        prompts.append((*stem[:cut], *draw(st.lists(st.integers(2, 3), min_size=1, max_size=20))))
    for prompt in prompts:
        places = [end for end in range(drop + unit, len(prompt) - fleet.ahead + 1, unit) if end > drop]
        for name in NAMES[:2]:
            chosen = draw(st.lists(st.sampled_from(places), max_size=6)) if places else []
            for end in chosen:
                fleet.mark(name, prompt, end, draw(salts))
    prompt = draw(st.sampled_from(prompts))
    return fleet, prompt, draw(salts), draw(st.integers(0, len(prompt) + 3)), unit, drop


@given(cases(), st.booleans())
def test_the_search_finds_what_trying_every_mark_finds(
    case: tuple[Fleet, Prompt, str | None, int, int, int], rooted: bool
) -> None:
    fleet, prompt, salt, limit, unit, drop = case
    chain = fleet.blocks.chain(prompt, salt=salt)
    found, _ = fleet.search(NAMES, chain, limit=limit, unit=unit, drop=drop, rooted=rooted)
    assert found == fleet.longest(prompt, salt, limit=limit, drop=drop)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=99, unique=True), st.integers(1, 9))
def test_a_search_asks_little_however_many_marks_mislead_it(places: list[int], unit: int) -> None:
    """The marked blocks are of prompts that all go on differently, so no end is found behind any of them."""
    fleet = Fleet(TokenBlockProcessor(4), 0)
    prompt = tuple(range(400))
    keys = [fleet.blocks.chain(prompt).end_key(place) for place in places]
    for name in NAMES:
        fleet.index.add(MODEL, name, keys, None)
    fleet.index.add(MODEL, "a", fleet.blocks.chain(prompt)[:], None)
    found, questions = fleet.search(NAMES, fleet.blocks.chain(prompt), limit=400, unit=unit)
    assert not found
    assert questions <= 2 * _MAX_ROUNDS


def test_a_bounded_chain_is_searched_as_far_as_it_is_known() -> None:
    fleet = Fleet(TokenBlockProcessor(4), 1)
    prompt = tuple(range(40))
    for end in (6, 10, 30):
        fleet.mark("a~ends", prompt, end, None)
    for bound, reused in ((0, None), (1, 6), (2, 10), (4, 10), (7, 30), (None, 30)):
        chain = fleet.blocks.chain(prompt, max_blocks=bound)
        found, _ = fleet.search(["a~ends"], chain, limit=39, unit=2)
        assert found.get("a~ends") == reused, bound


@pytest.mark.parametrize(("limit", "unit"), [(0, 4), (3, 4), (-1, 1), (40, 0)])
def test_nothing_is_asked_where_nothing_can_be_reused(limit: int, unit: int) -> None:
    fleet = Fleet(TokenBlockProcessor(4), 0)
    fleet.mark("a~ends", tuple(range(40)), 4, None)
    assert fleet.search(["a~ends"], fleet.blocks.chain(range(40)), limit=limit, unit=unit) == ({}, 0)


def test_two_questions_are_enough_for_a_prompt_that_is_known() -> None:
    fleet = Fleet(TokenBlockProcessor(4), 0)
    prompts: Sequence[Prompt] = [(*range(20), *range(100 * n, 100 * n + 20)) for n in (1, 2)]
    for name in NAMES:
        fleet.mark(name, prompts[1], 38, None)
    for name, end in zip(NAMES, (38, 22, 18), strict=True):
        fleet.mark(name, prompts[0], end, None)
    found, questions = fleet.search(NAMES, fleet.blocks.chain(prompts[0]), limit=39, unit=2)
    assert (found, questions) == (dict(zip(NAMES, (38, 22, 18), strict=True)), 2)


def test_a_name_that_holds_an_end_in_anothers_block_may_have_a_longer_one() -> None:
    fleet = Fleet(TokenBlockProcessor(4), 0)
    prompt, other = tuple(range(40)), (*range(20), *range(100, 120))
    fleet.mark("a~ends", other, 22, None)  # misleads: its block goes on differently
    for end in (2, 14):
        fleet.mark("a~ends", prompt, end, None)
    fleet.mark("c~ends", prompt, 2, None)
    found, _ = fleet.search(NAMES, fleet.blocks.chain(prompt), limit=39, unit=2)
    assert found == {"a~ends": 14, "c~ends": 2}


@pytest.mark.parametrize(
    ("rule", "reused"),
    [
        (Rule(unit=2), 8),
        (Rule(unit=2, reserve=0), 10),
        (Rule(unit=2, reserve=3), 6),
        (Rule(unit=2, drop=2), 6),
        (Rule(unit=2, reserve=0, drop=2), 8),  # what is cut leaves more than the reserve
        (Rule(unit=4), 8),
        (Rule(unit=16), None),
    ],
)
def test_tokens_at_the_end_of_a_prompt_are_reserved(rule: Rule, reused: int | None) -> None:
    fleet = Fleet(TokenBlockProcessor(4), 0)
    for end in (2, 4, 6, 8, 10):
        fleet.mark("a~ends", tuple(range(10)), end, None)
    asking = search(["a~ends"], fleet.blocks.chain(range(10)), rule, tokens=10, blocks=None)
    assert fleet.answered(asking)[0].get("a~ends") == reused
