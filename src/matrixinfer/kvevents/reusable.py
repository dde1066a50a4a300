"""Which of the prefixes that an engine holds it can reuse, marked in the index where they end.

An engine with one group of full attention reuses every prefix that it holds, and needs no marks. Others do not:

- with several attention groups (`rules`), every group must hold the prefix (`groups`);
- with speculative decoding, a block may depend on tokens after it (vLLM's `lookahead_token_ids`, SGLang's pairs), so a
  prefix is reused only by prompts that go on with these.

So a reusable prefix need not be followed, nor preceded, by a reusable one. Each is marked by two hashes under the
endpoint's name of ends: one says exactly where it ends (`TokenBlockProcessor.end`), the other is the token block before
that place, so that a lookup finds the last block with an end in it before it tries places within the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matrixinfer.blocks import Medium, TokenBlockProcessor
from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.index.base import BlockIndex
from matrixinfer.kvevents.forest import Forest
from matrixinfer.kvevents.groups import Group, Kind
from matrixinfer.kvevents.predecessors import Predecessors
from matrixinfer.kvevents.rules import Rules
from matrixinfer.kvevents.supports import Supports
from matrixinfer.kvevents.wire import BlockStored

_MARK_BYTES = 400


class Reusable:
    """The marks of one endpoint. The ledger says what changes, and `settle` brings the marks up to date.

    The forest of the primary group knows the tokens of every prefix. The others are sets of hashes.
    """

    def __init__(self, pod: str, model: str, index: BlockIndex, blocks: TokenBlockProcessor) -> None:
        self.rules = Rules()
        self._blocks = blocks
        self.supports = Supports(EndpointName.parse(pod).ends, index)
        """The marks."""
        self._groups: dict[int, Group] = {}
        self._marks: dict[int, tuple[str, list[int]]] = {}  # block that ends a prefix -> its model and hashes
        self._ahead: dict[int, bytes] = {}
        self._media_ahead: dict[int, list[Medium]] = {}
        self._dirty: dict[int, None] = {}
        self._predecessors = Predecessors(model)
        self._sparse: list[tuple[Group, Sequence[int]]] = []  # of this batch: blocks that need not follow each other

    @property
    def tokens(self) -> int:
        """The most tokens that any group besides the primary one, or the blocks with tokens after them, account for."""
        groups = max((len(group) * group.block_size for group in self._groups.values()), default=0)
        return max(groups, len(self._ahead) * self.rules.primary_size)

    def drops(self, groups: Iterable[int]) -> None:
        """The engine drops a block of each hit in these groups."""
        self.rules.drops(groups)
        self.touch(self._marks)

    @property
    def memory_bytes(self) -> int:
        """Estimated memory of groups and marks."""
        return _MARK_BYTES * len(self._marks) + sum(group.memory_bytes for group in self._groups.values())

    def learn(self, group: int, kind: Kind, block_size: int, span: int | None, forest: Forest | None) -> None:
        """An event of `group` has blocks of that kind and size. `forest` holds the primary group's blocks so far."""
        rules = self.rules
        if not rules.learn(group, kind, block_size, span):
            return
        for number, spec in rules.specs.items():
            if number == rules.primary and rules.is_rooted:
                continue
            if number not in self._groups:
                self._groups[number] = Group(spec.kind, spec.block_size, spec.span, self._predecessors.before)
            elif self._groups[number].block_size != spec.block_size:
                self.touch(self._groups[number].resize(spec.block_size))
        if forest is not None:
            self.touch(block for _, _, block in forest.below(None))

    def stored(self, group: int, blocks: Sequence[int], parent: int | None, *, is_dense: bool) -> None:
        """The group holds one more copy of `blocks`, which, if they are dense, follow each other and `parent`."""
        if group in self._groups:
            self.touch(self._groups[group].add(blocks, parent, linked=is_dense))
            if not is_dense:
                self._sparse.append((self._groups[group], blocks))

    def linked(self, event: BlockStored, blocks: Sequence[int], parent: int | None, tokens: bytes) -> None:
        """An event names blocks with all their tokens: so it is known which comes before which."""
        if event.block_size < self.rules.primary_size:  # otherwise the forest of the primary group knows
            self.touch(self._predecessors.learn(event, blocks, parent, tokens))

    def removed(self, group: int, blocks: Iterable[int]) -> None:
        """The group holds one copy less of `blocks`."""
        if group in self._groups:
            self.touch(self._groups[group].remove(blocks))

    def look_ahead(
        self, blocks: Sequence[int], ahead: Sequence[bytes], media: Iterable[tuple[int, list[Medium]]] = ()
    ) -> None:
        """`blocks` depend on these tokens after them as well, and those at some positions on `media` among them."""
        self.rules.look_ahead(max(len(tokens) // 4 for tokens in ahead))
        self._ahead.update(zip(blocks, ahead, strict=True))
        self._media_ahead.update((blocks[position], begin) for position, begin in media)

    def touch(self, blocks: Iterable[int]) -> None:
        """What ends with `blocks` may have become reusable, or not reusable any more."""
        self._dirty.update(dict.fromkeys(blocks))

    def settle(self, forest: Forest | None) -> None:
        """Mark what has become reusable, and take away the marks of what is not. `forest`: the primary group's blocks."""
        if not self._dirty:
            return
        self._predecessors.forest, self._predecessors.lookahead = forest, self.rules.lookahead
        self._link_sparse()
        for block in list(self._dirty):
            for group in self._groups.values():
                self.touch(group.known(block))
        if forest is not None and self.rules.primary is not None:
            changed = list(self._dirty)
            for _ in range(self.rules.drop // self.rules.primary_size):
                changed = [child for block in changed for child in forest.children(block)]
                self.touch(changed)
        dirty, self._dirty = self._dirty, {}
        new: dict[int, tuple[str, list[int]]] = {}
        for block in dirty:
            end = None if forest is None else self._end_of(forest, block)
            if end is None:
                self._unmark(block)
                if forest is None or block not in forest:
                    self._ahead.pop(block, None)
                    self._media_ahead.pop(block, None)
            elif block not in self._marks:
                new[block] = end
        self.supports.flush()  # before anything is added, which may be the same hashes
        for block, (model, hashes) in new.items():
            self._marks[block] = model, hashes
            self.supports.add(model, hashes, None)
        self._predecessors.forest = None

    def clear(self) -> None:
        """Nothing is held any more."""
        for group in self._groups.values():
            group.clear()
        self._marks.clear()
        self._ahead.clear()
        self._media_ahead.clear()
        self._dirty.clear()
        self._predecessors.clear()
        self._sparse.clear()
        self.supports.clear()

    def reset(self) -> None:
        """Learn of the groups again. What is known of drops stays."""
        self.clear()
        self.supports.forget()
        self._predecessors.reset()
        self._groups.clear()
        self.rules.reset()

    def _end_of(self, forest: Forest, block: int) -> tuple[str, list[int]] | None:
        """Model and hashes of the prefix that ends with `block`; None when it cannot be reused."""
        rules, run = self.rules, forest.run_of(block)
        if run is None or (block in forest.cut and rules.is_rooted):
            return None
        position = run.position(block)
        end, drop, unit = run.end(position), rules.drop, rules.unit
        if (end - drop) % unit or end <= drop or not self._is_held(block, end, drop):
            return None
        ahead = self._ahead.get(block, b"")
        if len(ahead) != 4 * rules.lookahead:
            return None
        if not self._groups and end % self._blocks.block_size and self._blocks.block_size % unit == 0:
            return None  # every block ends a reusable prefix: those at the ends of token blocks will do
        key, tokens, media = run.ending(position)
        if block in self._media_ahead:
            media = [*media, *((len(tokens) // 4 + at, name) for at, name in self._media_ahead[block])]
        return run.model, [key, self._blocks.end(key, tokens, ahead, media)]

    def _is_held(self, block: int, end: int, drop: int) -> bool:
        """Whether every other group holds what it must for the prefix that ends with `block`."""
        if not drop:
            return all(group.holds(block, end) for group in self._groups.values())
        reused = end - drop
        for number, group in self._groups.items():
            at = reused + self.rules.drop_of(number)
            last = block if at == end else self._predecessors.before(block, end - at)
            more = 1 if at > reused and group.kind is Kind.SLIDING else 0
            if last is None or not group.holds(last, at, more=more):
                return False
        return True

    def _link_sparse(self) -> None:
        """Link the blocks of sparse events, now that all of the batch is known."""
        for group, blocks in self._sparse:
            if group.kind is not Kind.MAMBA:
                for before, block in self._predecessors.consecutive(blocks, group.block_size):
                    group.link(block, before)
                self.touch(self._predecessors.deduce(blocks, group.block_size))
                self.touch(blocks)
        self._sparse.clear()

    def _unmark(self, block: int) -> None:
        mark = self._marks.pop(block, None)
        if mark is not None:
            model, hashes = mark
            self.supports.remove(model, hashes)
