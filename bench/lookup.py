"""The memory index alone: lookups of 128 blocks, writes and memory, compared with a dict of sets; and reusable ends."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Protocol

from bench.fleet import Writable, fill
from bench.measure import Figure, Scale, each, in_fresh_process, ratio, resident_bytes, rounds_of
from bench.prompts import MODEL
from matrixinfer.blocks import BlockChain, TokenBlockProcessor
from matrixinfer.index.ends import Rule, search
from matrixinfer.index.memory import MemoryIndex

_PODS = [f"pod-{i}" for i in range(64)]
_BLOCKS, _QUERIES, _EVENT_BLOCKS = 128, 128, 32
_WALK_US, _GALLOP_US = 40.0, 15.0
_WINDOW = 1_024
"""Tokens before the end of a held prefix in which an engine with sliding windows can reuse prefixes."""


class _Index(Writable, Protocol):
    def count(self, model: str, hashes: Sequence[int]) -> dict[str, int]: ...


class SetIndex:
    """The simplest index: a dict from block to the names of its pods."""

    def __init__(self) -> None:
        self._holders: dict[tuple[str, int], set[str]] = {}

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        for block in hashes:
            self._holders.setdefault((model, block), set()).add(pod)

    def count(self, model: str, hashes: Sequence[int]) -> dict[str, int]:
        counts: dict[str, int] = {}
        alive: set[str] | None = None
        for position, block in enumerate(hashes):
            held = self._holders.get((model, block), set())
            still = held if alive is None else alive & held
            for pod in (alive or held) - still:
                counts[pod] = position
            if not still:
                return counts
            alive = still
        counts.update(dict.fromkeys(alive or (), len(hashes)))
        return counts


def run(scale: Scale) -> Iterator[Figure]:
    """Lookups, writes and memory, by kind of index."""
    walk, gallop, sets = MemoryIndex(prefix_closed=False), MemoryIndex(), SetIndex()
    for index in (walk, gallop, sets):
        fill(index, _PODS, scale.index_blocks)
        hold_queries(index, _PODS, queries())
    yield from _lookups({"walk": (walk, _WALK_US), "gallop": (gallop, _GALLOP_US), "dict of sets": (sets, None)}, scale)
    yield from _writes(gallop, scale)
    yield from _ends(scale)
    # A quarter of the blocks fills the dict of sets to the same share.
    for case, measure, blocks in (
        ("index", index_memory, scale.index_blocks),
        ("dict of sets", sets_memory, scale.index_blocks // 4),
    ):
        resident, estimate = in_fresh_process(measure, blocks)
        yield Figure(case=case, name="memory per block", value=resident, unit="B")
        if estimate is not None:
            yield Figure(case=case, name="own estimate", value=estimate, unit="B")


def _lookups(indexes: Mapping[str, tuple[_Index, float | None]], scale: Scale) -> Iterator[Figure]:
    """Warm: the same prompt again, in the CPU's caches. Cold: other prompts in between."""
    chains = queries()
    for state, prompts in (("warm", chains[:1] * _QUERIES), ("cold", chains)):
        calls = [each(partial(index.count, MODEL), prompts) for index, _ in indexes.values()]
        times = rounds_of(*calls, scale=scale)
        for (index, (_, target)), seconds in zip(indexes.items(), times, strict=True):
            case = f"{index}, {state}"
            yield Figure(case=case, name="lookup", value=min(seconds) / _QUERIES * 1e6, unit="µs", target=target)
            yield Figure(case=case, name="relative to dict of sets", value=ratio(seconds, times[-1]), unit="×")


def _ends(scale: Scale) -> Iterator[Figure]:
    """A lookup where not every prefix is reusable, compared with the match that is a part of it. All blocks are hashed."""
    blocks = TokenBlockProcessor()
    for length in (128, 1_024):
        draw = random.Random(6)
        prompts = [draw.choices(range(100_000), k=length * blocks.block_size + 1) for _ in range(8)]
        chains = [blocks.chain(prompt) for prompt in prompts]
        for unit in (16, 128):
            index = MemoryIndex()
            fill(index, _PODS, scale.index_blocks // 10)
            hold_queries(index, _PODS, chains, times=length // _BLOCKS)
            for chain in chains:
                _mark(index, blocks, chain, unit)
            plain = each(partial(index.count, MODEL), chains)
            whole = each(partial(_reusable, index, Rule(unit=unit)), chains)
            seconds, reference = rounds_of(whole, plain, scale=scale)
            case = f"{length:,} blocks, ends every {unit} tokens"
            yield Figure(case=case, name="lookup", value=min(seconds) / len(chains) * 1e6, unit="µs")
            yield Figure(case=case, name="relative to a match alone", value=ratio(seconds, reference), unit="×")


def _mark(index: MemoryIndex, blocks: TokenBlockProcessor, chain: BlockChain, unit: int) -> None:
    """Mark the last ends of what each pod holds of a prompt."""
    for pod, held in index.count(MODEL, chain).items():
        for end in range(max(unit, held * blocks.block_size - _WINDOW + unit), held * blocks.block_size + 1, unit):
            key = chain.end_key((end - 1) // blocks.block_size)
            index.add(MODEL, f"{pod}~ends", [key, chain.end(end)], None)


def _reusable(index: MemoryIndex, rule: Rule, chain: BlockChain) -> dict[str, int]:
    """The whole lookup: the match, and the search for the longest reusable prefix of every pod that matches."""
    counts = index.count(MODEL, chain)
    names = [f"{pod}~ends" for pod in counts]
    longest = max(counts.values(), default=0)
    asking = search(names, chain, rule, tokens=chain.tokens, blocks=longest)
    try:
        question = next(asking)
        while True:
            question = asking.send(index.last_of(MODEL, *question))
    except StopIteration as done:
        found: dict[str, int] = done.value
        return found


def queries(count: int = _QUERIES) -> list[list[int]]:
    """Prompts, as block hashes."""
    draw = random.Random(3)
    return [[draw.getrandbits(63) for _ in range(_BLOCKS)] for _ in range(count)]


def hold_queries(index: Writable, pods: Sequence[str], chains: Sequence[Sequence[int]], *, times: int = 1) -> None:
    """Add a prefix of each chain to the pods: 15 blocks to all, 40 to eight of them, 100 to two, and 128 to one.

    `times` that many blocks, for longer chains.
    """
    draw = random.Random(4)
    for chain in chains:
        for pod in pods:
            index.add(MODEL, pod, chain[: 15 * times], None)
        for pod, count in zip(draw.sample(pods, 11), (40,) * 8 + (100, 100, 128), strict=True):
            index.add(MODEL, pod, chain[: count * times], None)


def _writes(index: MemoryIndex, scale: Scale) -> Iterator[Figure]:
    """Events of 32 blocks: new blocks, the same blocks on another pod, and removals. The index keeps its size."""
    draw = random.Random(5)
    events = [[draw.getrandbits(63) for _ in range(_EVENT_BLOCKS)] for _ in range(scale.index_blocks // 200)]
    first, second = _PODS[:2]
    steps: dict[str, Callable[[list[int]], None]] = {
        "add": lambda event: index.add(MODEL, first, event, None),
        "add a holder": lambda event: index.add(MODEL, second, event, None),
        "remove a holder": lambda event: index.remove(MODEL, second, event[::-1]),
        "remove": lambda event: index.remove(MODEL, first, event[::-1]),
    }
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(scale.rounds):
        for name, step in steps.items():
            start = perf_counter()
            each(step, events)()
            best[name] = min(best[name], perf_counter() - start)
    for name, seconds in best.items():
        yield Figure(case=name, name="rate", value=len(events) * _EVENT_BLOCKS / seconds / 1e6, unit="M blocks/s")


def index_memory(blocks: int) -> tuple[float, float | None]:
    """Bytes per block of this process's memory, and as the index itself estimates them."""
    index = MemoryIndex()
    return _growth(index, blocks), index.stats().memory_bytes / blocks


def sets_memory(blocks: int) -> tuple[float, float | None]:
    """Bytes per block of this process's memory."""
    return _growth(SetIndex(), blocks), None


def _growth(index: Writable, blocks: int) -> float:
    before = resident_bytes()
    fill(index, _PODS, blocks)
    return (resident_bytes() - before) / blocks
