"""The ledger against a reference that recomputes, after every event, what a prompt could reach."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.blocks import BlockChain, Scheme, TokenBlockProcessor
from matrixinfer.kvevents.counts import UntrustedEvents

from .support import CLEARED, MODEL, Follower, removed, stored


@dataclass(frozen=True)
class Block:
    """An engine block; its position in the forest is its hash."""

    parent: int | None
    tokens: tuple[int, ...]
    adapter: str | None
    salt: str | None
    image: tuple[str, int] | None
    """A medium that begins in the block, or did before it."""
    embeds: bool

    @property
    def extra_keys(self) -> list[Any] | None:
        salt = self.salt if self.parent is None else None
        keys = [self.adapter, self.image, salt, b"digest" if self.embeds else None]
        return [key for key in keys if key is not None] or None


Forest: TypeAlias = list[Block]
Place: TypeAlias = tuple[str | None, int | None]  # medium and group


@dataclass(frozen=True)
class Store:
    """The blocks up to `block` are stored at `place`, but for the first `skip`, in events of up to `batch` blocks."""

    place: Place
    block: int
    skip: int
    batch: int


@dataclass(frozen=True)
class Remove:
    """One copy of each of `blocks` is evicted from `place`, in this order."""

    place: Place
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Clear:
    """Everything is dropped on the device."""


Step: TypeAlias = Store | Remove | Clear


def path_to(forest: Forest, block: int) -> list[int]:
    path, at = [], block
    while True:
        path.append(at)
        parent = forest[at].parent
        if parent is None:
            return path[::-1]
        at = parent


def stored_together(forest: Forest, step: Store) -> list[list[int]]:
    """The blocks of each event: consecutive ones of one size share it."""
    groups: list[list[int]] = []
    for block in path_to(forest, step.block)[step.skip :]:
        last = groups[-1] if groups else []
        if last and len(last) < step.batch and len(forest[last[-1]].tokens) == len(forest[block].tokens):
            last.append(block)
        else:
            groups.append([block])
    return groups


def events_of(forest: Forest, step: Step) -> list[dict[str, Any]]:
    """What the engine publishes."""
    if isinstance(step, Clear):
        return [CLEARED]
    medium, group = step.place
    if isinstance(step, Remove):
        return [removed(step.blocks, medium=medium, group_idx=group)]
    return [
        stored(
            blocks,
            [token for block in blocks for token in forest[block].tokens],
            parent=forest[blocks[0]].parent,
            lora_name=forest[blocks[0]].adapter,
            lora_id=None if forest[blocks[0]].adapter is None else 1,
            extra_keys=[forest[block].extra_keys for block in blocks],
            medium=medium,
            group_idx=group,
            kv_cache_spec_kind="full_attention",
        )
        for blocks in stored_together(forest, step)
    ]


class Reference:
    """Copies of each block at each place, and nothing else; the rest is worked out from scratch."""

    def __init__(self, forest: Forest, blocks: TokenBlockProcessor) -> None:
        self.forest = forest
        self.blocks = blocks
        self.present: dict[tuple[str, int], Counter[int]] = {}

    def apply(self, step: Step) -> None:
        if isinstance(step, Clear):
            self.present = {place: copies for place, copies in self.present.items() if place[0] == "CPU"}
            return
        copies = self.present.setdefault((step.place[0] or "GPU", step.place[1] or 0), Counter())
        if isinstance(step, Remove):
            for block in step.blocks:
                copies[block] -= copies[block] > 0
            return
        for blocks in stored_together(self.forest, step):
            is_root = self.forest[blocks[0]].parent is None
            if is_root and len(blocks) > 1 and step.place[0] != "CPU" and all(copies[block] for block in blocks):
                continue  # hits reported again
            for block in blocks:
                parent = self.forest[block].parent
                if parent is None or copies[parent] or copies[block]:
                    copies[block] += 1

    def contents(self) -> dict[str, set[int]]:
        """The token blocks that an unbroken path of present, indexable engine blocks covers."""
        held: dict[str, set[int]] = {}
        for copies in self.present.values():
            for block in +copies:
                path = path_to(self.forest, block)
                if all(copies[above] and not self.forest[above].embeds for above in path):
                    root = self.forest[path[0]]
                    if self.blocks.scheme == "block" and any(self.starts(path)):
                        continue
                    tokens = [token for above in path for token in self.forest[above].tokens]
                    chain = self.blocks.chain(tokens, salt=root.salt, media=list(self.starts(path)))
                    names = held.setdefault(root.adapter or MODEL, set())
                    names.update(self.names(chain, len(tokens), len(self.forest[block].tokens)))
        return {model: blocks for model, blocks in held.items() if blocks}

    def starts(self, path: list[int]) -> Iterator[tuple[int, str]]:
        """The media that begin on a path."""
        at = 0
        for each in map(self.forest.__getitem__, path):
            if each.image is not None and each.image[1] >= 0:
                yield at + each.image[1], each.image[0]
            at += len(each.tokens)

    def names(self, chain: BlockChain, tokens: int, engine_block: int) -> Iterator[int]:
        """What the index has of a chain that ends with a block of so many tokens."""
        yield from chain
        tail = chain.tail(len(chain), engine_block) if chain else None
        if tail and tail[0] == tokens % self.blocks.block_size:
            yield tail[1]


PLACES: list[Place] = [(None, None), ("GPU", 0), ("CPU", 0)]


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    sizes = st.sampled_from(draw(st.sampled_from([(1,), (2,), (3,), (4,), (6,), (8,)])))
    forest: Forest = []
    for _ in range(draw(st.integers(1, 10))):
        parent = None
        if forest:
            last = len(forest) - 1
            parent = draw(st.one_of(st.just(last), st.integers(0, last), st.none()))
        # Two tokens only, so that prompts share token blocks that their engine blocks do not.
        tokens = tuple(draw(st.lists(st.integers(0, 1), min_size=(size := draw(sizes)), max_size=size)))
        if parent is None:
            adapter, salt = draw(st.sampled_from([(None, None)] * 3 + [("poet", None), (None, "s"), ("poet", "s")]))
        else:
            adapter, salt = forest[parent].adapter, forest[parent].salt
        names = st.sampled_from(["cat", "dog"])
        image = draw(st.one_of(st.none(), st.none(), st.tuples(names, st.integers(-3, len(tokens) - 1))))
        embeds = draw(st.sampled_from([False] * 9 + [True]))
        block = Block(parent=parent, tokens=tokens, adapter=adapter, salt=salt, image=image, embeds=embeds)
        forest.append(block)
    return forest


@st.composite
def lives(draw: st.DrawFn) -> tuple[Forest, list[Step]]:
    forest = draw(forests())
    block = st.integers(0, len(forest) - 1)
    place = st.sampled_from(PLACES[: draw(st.sampled_from([1, 1, 3]))])
    stores = st.builds(Store, place, block, st.sampled_from([0, 0, 0, 1, 2, 5]), st.sampled_from([1, 2, 100]))
    removals = st.builds(Remove, place, st.lists(block, min_size=1, max_size=4).map(tuple))
    steps = st.lists(st.one_of(stores, stores, removals, removals), max_size=25)
    life: list[Step] = [*draw(steps)]
    if draw(st.booleans()):
        life += [Clear(), *draw(steps)]
    return forest, life


@given(
    life=lives(),
    block_size=st.sampled_from([1, 2, 3, 4, 5, 8]),
    scheme=st.sampled_from(["prefix", "prefix", "prefix", "block"]),
)
def test_the_index_holds_what_a_prompt_can_reach_after_any_events(
    life: tuple[Forest, list[Step]], block_size: int, scheme: Scheme
) -> None:
    forest, steps = life
    follower = Follower(TokenBlockProcessor(block_size, scheme))
    reference = Reference(forest, follower.blocks)
    for step in steps:
        follower.apply(*events_of(forest, step))
        reference.apply(step)
        assert follower.index.contents() == reference.contents()
        assert len(follower.ledger) == sum(len(+copies) for copies in reference.present.values())


@given(life=lives(), block_size=st.sampled_from([1, 2, 3, 4, 5, 8]), data=st.data())
def test_nothing_is_kept_once_every_block_is_removed_in_any_order(
    life: tuple[Forest, list[Step]], block_size: int, data: st.DataObject
) -> None:
    forest, steps = life
    follower = Follower(TokenBlockProcessor(block_size))
    reference = Reference(forest, follower.blocks)
    for step in steps:
        follower.apply(*events_of(forest, step))
        reference.apply(step)
    for place, copies in reference.present.items():
        for block in data.draw(st.permutations(sorted(copies.elements()))):
            follower.apply(removed([block], medium=place[0], group_idx=place[1]))
    ledger = follower.ledger
    assert follower.total == len(ledger) == 0
    assert not len(ledger.supports)
    assert all(each.is_empty for each in ledger.forests)


@given(data=st.data(), engine_block=st.integers(1, 9), block_size=st.integers(1, 9))
def test_a_match_is_what_the_engine_finds_at_all_block_sizes(
    data: st.DataObject, engine_block: int, block_size: int
) -> None:
    prompt = st.lists(st.integers(0, 1), min_size=2, max_size=40)
    prompts = data.draw(st.lists(prompt, min_size=1, max_size=4))
    follower = Follower(TokenBlockProcessor(block_size))
    held: dict[tuple[int, ...], int] = {(): 0}  # engine blocks as the tokens up to their end, by hash
    for tokens in prompts:
        for end in range(engine_block, len(tokens) + 1, engine_block):
            path = tuple(tokens[:end])
            if path not in held:
                held[path] = len(held)
                parent = held[path[:-engine_block]] or None
                follower.apply(stored([held[path]], path[-engine_block:], parent=parent))
    asked = data.draw(st.one_of(prompt, st.sampled_from(prompts)))
    engine_hit = max(len(path) for path in held if tuple(asked[: len(path)]) == path)
    found = follower.hit(asked, engine_block)
    if engine_block % block_size:
        engine_hit -= engine_hit % block_size
        found -= found % block_size
    assert found == engine_hit


ids = st.integers(0, 5)
any_stored = st.builds(
    lambda hashes, parent, token: stored(hashes, [token] * (2 * len(hashes)), parent=parent, block_size=2),
    st.lists(ids, min_size=1, max_size=3),
    st.none() | ids,
    st.integers(0, 1),
)
any_removed = st.builds(removed, st.lists(ids, max_size=4))


@given(st.lists(st.one_of(any_stored, any_stored, any_removed), max_size=20), st.sampled_from([1, 2, 3]))
def test_events_that_make_no_sense_are_survived(events: list[dict[str, Any]], block_size: int) -> None:
    """Hashes with several parents, blocks that follow themselves: no engine does this, and nothing is claimed for it."""
    follower = Follower(TokenBlockProcessor(block_size), strict=False)
    with suppress(UntrustedEvents):
        for event in events:
            follower.apply(event)
    follower.ledger.clear()
    assert follower.total == len(follower.ledger) == 0
