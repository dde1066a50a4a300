"""What an index and its ends say of a prompt, against a reference that looks at every block of every group.

The reference knows the tokens behind each hash. It publishes random events, as engines lay them out, and predicts hits by
the engines' rules alone.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import pytest

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.index.ends import search

from .support import CLEARED, MODEL, POD, Follower, removed, stored

Tokens = tuple[int, ...]
Prefix = tuple[str | None, Tokens]
"""A salt, and the tokens on which a block depends."""
FULL, SLIDING, CHUNKED, MAMBA = "full_attention", "sliding_window", "chunked_local_attention", "mamba"
SEEDS = range(6)
BATCHES = 40


@dataclass(frozen=True)
class Kind:
    """An attention group."""

    name: str
    size: int
    span: int = 0
    """Window or chunk."""
    sparse: bool = False


class Prompts:
    """Prompts that share prefixes, and a hash for each prefix."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._bases = [tuple(draw.randrange(3) for _ in range(40)) for _ in range(3)]
        self.names: dict[Prefix, int] = {}

    def prompt(self) -> Prefix:
        base, cut = self._draw.choice(self._bases), self._draw.randrange(41)
        tail = [self._draw.randrange(3) for _ in range(self._draw.choice([0, 0, 3, 9]))]
        return self._draw.choice([None, None, "salt"]), (*base[:cut], *tail)

    def name(self, prefix: Prefix) -> int:
        return self.names.setdefault(prefix, len(self.names) + 1)


class GroupedEngine:
    """An engine with attention groups, such as vLLM."""

    def __init__(self, seed: int, kinds: Sequence[Kind], ahead: int) -> None:
        self._draw = random.Random(seed)
        self.prompts = Prompts(self._draw)
        self._kinds, self._ahead = kinds, ahead
        self._held: list[Counter[int]] = [Counter() for _ in kinds]
        self.unit = lcm(*(kind.size for kind in kinds))
        self.is_simple = len(kinds) == 1

    def prepare(self, follower: Follower) -> None:
        for number, kind in enumerate(self._kinds):
            if kind.name == CHUNKED:
                follower.ledger.rules.chunks(number, kind.span)

    def batch(self, *, is_first: bool) -> Iterator[dict[str, Any]]:
        if is_first:
            salt, tokens = None, tuple(range(40))
            for number in range(len(self._kinds)):
                yield self._store(number, salt, tokens, 0, 40 // self._kinds[number].size)
            return
        if not self._draw.randrange(25):
            self._held = [Counter() for _ in self._kinds]
            yield CLEARED
        for _ in range(self._draw.randrange(1, 5)):
            number = self._draw.randrange(len(self._kinds))
            if self._draw.random() < 0.35:
                yield from self._evict(number)
            else:
                salt, tokens = self.prompts.prompt()
                blocks = (len(tokens) - self._ahead) // self._kinds[number].size
                first = self._draw.randint(0, max(0, self._run(number, salt, tokens)))
                if blocks > first:
                    yield self._store(number, salt, tokens, first, self._draw.choice([blocks, first + 1]))

    def hit(self, salt: str | None, tokens: Tokens) -> int:
        """The largest prefix that every group holds."""
        top = (len(tokens) - max(1, self._ahead)) // self.unit * self.unit
        for end in range(top, 0, -self.unit):
            if all(self._holds(number, salt, tokens, end) for number in range(len(self._kinds))):
                return end
        return 0

    def _name(self, salt: str | None, tokens: Tokens, end: int) -> int:
        return self.prompts.name((salt, tokens[: end + self._ahead]))

    def _is_held(self, number: int, salt: str | None, tokens: Tokens, end: int) -> bool:
        return self._name(salt, tokens, end) in self._held[number]

    def _holds(self, number: int, salt: str | None, tokens: Tokens, end: int) -> bool:
        kind = self._kinds[number]
        first = 0
        if kind.name == MAMBA:
            first = end - kind.size
        elif kind.name == SLIDING:
            first = max(0, end - -(-(kind.span - 1) // kind.size) * kind.size)
        elif kind.name == CHUNKED:
            first = end // kind.span * kind.span
        return all(self._is_held(number, salt, tokens, at) for at in range(first + kind.size, end + 1, kind.size))

    def _run(self, number: int, salt: str | None, tokens: Tokens) -> int:
        """How many blocks are held from the root: a group of full attention stores no block without those before it."""
        size, run = self._kinds[number].size, 0
        most = (len(tokens) - self._ahead) // size
        while run < most and self._is_held(number, salt, tokens, (run + 1) * size):
            run += 1
        return run

    def _store(self, number: int, salt: str | None, tokens: Tokens, first: int, last: int) -> dict[str, Any]:
        kind = self._kinds[number]
        places = range(first, last)
        if kind.sparse and self._draw.random() < 0.7:
            if kind.name == MAMBA:
                places_held: Sequence[int] = [place for place in places if self._draw.random() < 0.7]
            else:
                places_held = places[self._draw.randint(0, len(places)) :]
        else:
            places_held = places
        hashes = [self._name(salt, tokens, (place + 1) * kind.size) for place in places_held]
        self._held[number].update(hashes)
        is_dense = len(hashes) == len(places)
        fields: dict[str, Any] = {}
        if self._ahead:
            ends = [(place + 1) * kind.size for place in places_held]
            fields["lookahead_token_ids"] = [list(tokens[end : end + self._ahead]) for end in ends]
        if salt is not None and first == 0 and is_dense:
            fields["extra_keys"] = [[salt], *[None] * (len(hashes) - 1)]
        return stored(
            hashes,
            tokens[first * kind.size : last * kind.size],
            parent=self._name(salt, tokens, first * kind.size) if first else None,
            block_size=kind.size,
            group_idx=number,
            kv_cache_spec_kind=kind.name,
            kv_cache_spec_sliding_window=kind.span if kind.name == SLIDING else None,
            **fields,
        )

    def _evict(self, number: int) -> Iterator[dict[str, Any]]:
        held = sorted(self._held[number].elements())
        gone = self._draw.sample(held, min(len(held), self._draw.randrange(1, 4)))
        if gone:
            self._held[number] -= Counter(gone)
            yield removed(gone, group_idx=number)


class PagedEngine:
    """An engine with a radix tree of pages on several media, such as SGLang."""

    def __init__(self, seed: int, size: int, *, pairs: bool) -> None:
        self._draw = random.Random(seed)
        self.prompts = Prompts(self._draw)
        self.unit, self._ahead = size, int(pairs)
        self.is_simple = True
        self._held: dict[tuple[str | None, int, str], None] = {}

    def prepare(self, follower: Follower) -> None:
        pass

    def batch(self, *, is_first: bool) -> Iterator[dict[str, Any]]:
        if is_first or not self._draw.randrange(25):
            self._held.clear()
            yield CLEARED
        for _ in range(self._draw.randrange(1, 5)):
            if self._draw.random() < 0.3:
                yield from self._evict()
                continue
            salt, tokens = self.prompts.prompt()
            pages = (len(tokens) - self._ahead) // self.unit
            first = self._draw.randint(0, self._run(salt, tokens))
            if pages > first:
                yield self._store(salt, tokens, first, self._draw.choice([pages, first + 1]))

    def hit(self, salt: str | None, tokens: Tokens) -> int:
        """The pages from the root, on any medium, of all tokens but the last."""
        return self._run(salt, tokens[:-1]) * self.unit

    def _name(self, tokens: Tokens, page: int) -> int:
        return self.prompts.name((None, tokens[: (page + 1) * self.unit + self._ahead]))

    def _is_held(self, salt: str | None, name: int) -> bool:
        return any((salt, name, medium) in self._held for medium in ("GPU", "CPU_PINNED", "DISK"))

    def _run(self, salt: str | None, tokens: Tokens) -> int:
        most, run = (len(tokens) - self._ahead) // self.unit, 0
        while run < most and self._is_held(salt, self._name(tokens, run)):
            run += 1
        return run

    def _store(self, salt: str | None, tokens: Tokens, first: int, last: int) -> dict[str, Any]:
        medium = self._draw.choice(["GPU", "GPU", "CPU_PINNED", "DISK"])
        names = [self._name(tokens, page) for page in range(first, last)]
        self._held.update(dict.fromkeys((salt, name, medium) for name in names))
        content: list[Any] = list(tokens[first * self.unit : last * self.unit])
        if self._ahead:
            content = [tokens[at : at + 2] for at in range(first * self.unit, last * self.unit)]
        return {
            "type": "BlockStored",
            "block_hashes": names,
            "parent_block_hash": self._name(tokens, first - 1) if first else None,
            "token_ids": content,
            "block_size": self.unit,
            "lora_id": None,
            "medium": medium,
            **({} if salt is None else {"cache_salt": salt}),
        }

    def _evict(self) -> Iterator[dict[str, Any]]:
        salt, name, medium = self._draw.choice(list(self._held) or [(None, 0, "GPU")])
        twins = [key for key in self._held if key[1:] == (name, medium)]
        if len(twins) == 1:  # of several the event would not say which
            del self._held[salt, name, medium]
            yield removed([name], medium=medium)


def predicted(follower: Follower, salt: str | None, tokens: Tokens, unit: int) -> int:
    """The hit that the index shows."""
    chain = follower.blocks.chain(tokens, salt=salt)
    count = follower.index.count(MODEL, chain).get(POD, 0)
    rule = follower.ledger.rules.rule
    if rule is None:
        tail = chain.tail(count, unit)
        more = tail[0] if tail and POD in follower.index.count(MODEL, tail[1:]) else 0
        return min(count * follower.blocks.block_size + more, len(tokens) - 1) // unit * unit
    ends = EndpointName.parse(POD).ends
    asking = search([ends], chain, rule, tokens=len(tokens), blocks=count)
    try:
        question = next(asking)
        while True:
            question = asking.send(follower.index.last_of(MODEL, *question))
    except StopIteration as done:
        found: dict[str, int] = done.value
        return found.get(ends, 0)


def check(engine: GroupedEngine | PagedEngine, block_size: int) -> int:
    """Run an engine's life. Returns how many tokens were hit, all in all."""
    follower = Follower(TokenBlockProcessor(block_size))
    engine.prepare(follower)
    hits = 0
    for number in range(BATCHES):
        follower.apply(*engine.batch(is_first=not number))
        for _ in range(4):
            salt, tokens = engine.prompts.prompt()
            if tokens:
                hit, found = engine.hit(salt, tokens), predicted(follower, salt, tokens, engine.unit)
                if engine.is_simple and engine.unit % block_size:  # token blocks are no more precise
                    hit, found = hit // block_size * block_size, found // block_size * block_size
                assert found == hit, (number, salt, tokens)
                hits += hit
    return hits


ENGINES: dict[str, tuple[list[Kind], int]] = {
    "full and sliding": ([Kind(FULL, 4), Kind(SLIDING, 4, 10)], 0),
    "full and sliding, sparse": ([Kind(FULL, 4), Kind(SLIDING, 4, 10, sparse=True)], 0),
    "two windows before full, sparse": (
        [Kind(SLIDING, 4, 6, sparse=True), Kind(SLIDING, 4, 12, sparse=True), Kind(FULL, 4)],
        0,
    ),
    "full and coarser sliding, sparse": ([Kind(FULL, 2), Kind(SLIDING, 4, 10, sparse=True)], 0),
    "full and finer sliding": ([Kind(FULL, 4), Kind(SLIDING, 2, 6)], 0),
    "full and mamba, sparse": ([Kind(FULL, 4), Kind(MAMBA, 4, sparse=True)], 0),
    "full and coarser mamba": ([Kind(FULL, 2), Kind(MAMBA, 8, sparse=True)], 0),
    "two of mamba before mla, sparse": ([*[Kind(MAMBA, 4, sparse=True)] * 2, Kind("mla_attention", 4)], 0),
    "full and chunked": ([Kind(FULL, 4), Kind(CHUNKED, 4, 8)], 0),
    "two of full": ([Kind(FULL, 4), Kind(FULL, 4)], 0),
    "two of full, of two sizes": ([Kind(FULL, 2), Kind(FULL, 4)], 0),
    "full with lookahead": ([Kind(FULL, 4)], 1),
    "full and sliding with lookahead": ([Kind(FULL, 4), Kind(SLIDING, 4, 10)], 1),
    "mla with a lookahead of three": ([Kind("mla_attention", 4)], 3),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_hits_of_attention_groups_are_what_every_group_holds(engine: str, seed: int) -> None:
    kinds, ahead = ENGINES[engine]
    assert check(GroupedEngine(seed, kinds, ahead), [1, 3, 4, 5, 8, 16][seed]) > 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("size", "pairs"), [(1, False), (4, False), (1, True), (4, True)])
def test_hits_of_pages_are_those_on_any_medium(size: int, pairs: bool, seed: int) -> None:
    assert check(PagedEngine(seed, size, pairs=pairs), [1, 3, 4, 5, 8, 16][seed]) > 0
