"""Which of the prefixes that an engine holds it can reuse, marked in the index where they end.

An engine with one group of full attention reuses every prefix that it holds, and needs no marks. Others do not:

- with several attention groups, every group must hold the prefix (`groups`);
- with speculative decoding, a block may depend on tokens after it (vLLM's `lookahead_token_ids`, SGLang's pairs), so a
  prefix is reused only by prompts that go on with these.

So a reusable prefix need not be followed, nor preceded, by a reusable one. Each is marked by two hashes under the
endpoint's name of ends: one says exactly where it ends (`TokenBlockProcessor.end`), the other is the token block before
that place, so that a lookup finds the last block with an end in it before it tries places within the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import lcm
from typing import NamedTuple

from matrixinfer.blocks import Medium, TokenBlockProcessor
from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.index.base import BlockIndex
from matrixinfer.index.ends import Rule
from matrixinfer.kvevents.forest import Forest
from matrixinfer.kvevents.groups import Group, Kind
from matrixinfer.kvevents.predecessors import Predecessors
from matrixinfer.kvevents.run import Run
from matrixinfer.kvevents.supports import Supports
from matrixinfer.kvevents.wire import BlockStored

_MARK_BYTES = 400


class Spec(NamedTuple):
    """What the events say of an attention group."""

    kind: Kind
    block_size: int
    """Tokens per block; the largest, where events have several sizes."""
    span: int | None
    """Window or chunk in tokens, where there is one and events say it."""
    has_fine_blocks: bool = False
    """Some events have smaller blocks than others."""


class Reusable:
    """The marks of one endpoint. The ledger says what changes, and `settle` brings the marks up to date.

    One group is the `primary` one: its forest knows the tokens of every prefix. The others are sets of hashes.
    """

    def __init__(self, pod: str, model: str, index: BlockIndex, blocks: TokenBlockProcessor) -> None:
        self.specs: dict[int, Spec] = {}
        self.primary: int | None = None
        """The group whose blocks are indexed; None before the first event."""
        self.lookahead = 0
        """Tokens after a block on which its content depends as well."""
        self.reserve = 1
        """Tokens at a prompt's end that are never reused."""
        self.rule: Rule | None = None
        """How the marks are searched; None where every prefix that is held is reused."""
        self.drop_is_settled = False
        """Whether answers have confirmed `drop`, so that a later answer with less says something else."""
        self._drops: frozenset[int] = frozenset()
        self._chunks: dict[int, int] = {}
        self._plain: tuple[int, int] | None = None
        self.is_rooted = True
        """Whether a reusable prefix is held from its first token on; not so where the primary group slides."""
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
        size = 0 if self.primary is None else self.specs[self.primary].block_size
        return max(groups, len(self._ahead) * size)

    def is_plain(self, group: int, block_size: int) -> bool:
        """Whether an event of that group, with blocks of that size, says nothing new of the only group."""
        return self._plain == (group, block_size)

    @property
    def unit(self) -> int:
        """Reusable prefixes are multiples of this many tokens; 0 before the first event."""
        return lcm(*(spec.block_size for spec in self.specs.values())) if self.specs else 0

    @property
    def drop(self) -> int:
        """Tokens by which the engine cuts each prefix that it holds before it reuses it; 0 unless it is known to."""
        if not self._drops or self.primary is None:
            return 0
        # The primary group's blocks say which tokens there are.
        size = self.specs[self.primary].block_size
        return max(-(-self._drop_of(number) // size) * size for number in self.specs)

    @property
    def drops_unevenly(self) -> bool:
        """Whether the engine drops blocks that are smaller than the primary group's: where they end is not published."""
        size = 0 if self.primary is None else self.specs[self.primary].block_size
        return any(0 < self._drop_of(number) < size for number in self.specs)

    @property
    def drops_beyond(self) -> bool:
        """Whether another group must hold more beyond a prefix than the primary one, whose blocks there may be gone."""
        return self.primary is not None and self.drop > self._drop_of(self.primary)

    def _drop_of(self, group: int) -> int:
        """Tokens that a group must hold beyond a prefix that is reused."""
        spec = self.specs[group]
        return spec.block_size if group in self._drops and spec.kind in (Kind.FULL, Kind.SLIDING) else 0

    def drops(self, groups: Iterable[int]) -> None:
        """The engine looks for one block more than it reuses in these groups, as vLLM 0.32 does with EAGLE or MTP.

        No event says so.
        """
        self._drops = frozenset(groups)
        self._set_rule()
        self.touch(self._marks)

    @property
    def memory_bytes(self) -> int:
        """Estimated memory of groups and marks."""
        return _MARK_BYTES * len(self._marks) + sum(group.memory_bytes for group in self._groups.values())

    def _set_rule(self) -> None:
        self.is_rooted = self.primary is None or self.specs[self.primary].kind is Kind.FULL
        self._plain = None
        if not self.lookahead and len(self.specs) < 2 and self.is_rooted:
            self.rule = None
            if self.primary is not None:
                self._plain = self.primary, self.specs[self.primary].block_size
        else:
            # A single group drops a block of the longest hit; of several each looks for one block more than the hit.
            reserve = 0 if self.drop and len(self.specs) > 1 else self.reserve
            self.rule = Rule(self.unit, self.lookahead, reserve, self.drop, self.is_rooted)

    def learn(self, group: int, kind: Kind, block_size: int, span: int | None, forest: Forest | None) -> None:
        """An event of `group` has blocks of that kind and size. `forest` holds the primary group's blocks so far."""
        span = self._chunks.get(group, span)
        known = self.specs.get(group)
        if known is not None:
            if block_size == known.block_size or (block_size < known.block_size and known.has_fine_blocks):
                return
            block_size, span = max(block_size, known.block_size), span or known.span
        self.specs[group] = Spec(kind, block_size, span, known is not None)
        full = [number for number, spec in self.specs.items() if spec.kind is Kind.FULL]
        candidates = [number for number in full if number in self._drops] or full or list(self.specs)
        if self.primary not in candidates:
            self.primary = min(candidates)
        self.is_rooted = bool(full)
        for number, spec in self.specs.items():
            if number == self.primary and self.is_rooted:
                continue
            if number not in self._groups:
                self._groups[number] = Group(spec.kind, spec.block_size, spec.span, self._predecessors.before)
            elif self._groups[number].block_size != spec.block_size:
                self.touch(self._groups[number].resize(spec.block_size))
        self._set_rule()
        if forest is not None:
            self.touch(block for _, _, block in forest.below(None))

    def chunks(self, group: int, tokens: int) -> None:
        """The group's attention works in chunks of that many tokens, which no event says."""
        self._chunks[group] = tokens

    def stored(self, group: int, blocks: Sequence[int], parent: int | None, *, is_dense: bool) -> None:
        """The group holds one more copy of `blocks`, which, if they are dense, follow each other and `parent`."""
        if group in self._groups:
            self.touch(self._groups[group].add(blocks, parent, linked=is_dense))
            if not is_dense:
                self._sparse.append((self._groups[group], blocks))

    def look_ahead_in_pairs(self) -> None:
        """Blocks are of pairs of tokens, of which the engine never looks up a prompt's last one."""
        self.reserve = 2
        self._set_rule()

    def linked(self, event: BlockStored, blocks: Sequence[int], parent: int | None, tokens: bytes) -> None:
        """An event names blocks with all their tokens: so it is known which comes before which."""
        spec = None if self.primary is None else self.specs[self.primary]
        if spec is not None and event.block_size < spec.block_size:  # otherwise the forest of the primary group knows
            self.touch(self._predecessors.learn(event, blocks, parent, tokens))

    def removed(self, group: int, blocks: Iterable[int]) -> None:
        """The group holds one copy less of `blocks`."""
        if group in self._groups:
            self.touch(self._groups[group].remove(blocks))

    def look_ahead(
        self, blocks: Sequence[int], ahead: Sequence[bytes], media: Iterable[tuple[int, list[Medium]]] = ()
    ) -> None:
        """`blocks` depend on these tokens after them as well, and those at some positions on `media` among them."""
        longest = max(len(tokens) // 4 for tokens in ahead)
        if longest > self.lookahead:
            self.lookahead = longest
            self._set_rule()
        self._ahead.update(zip(blocks, ahead, strict=True))
        self._media_ahead.update((blocks[position], begin) for position, begin in media)

    def touch(self, blocks: Iterable[int]) -> None:
        """What ends with `blocks` may have become reusable, or not reusable any more."""
        self._dirty.update(dict.fromkeys(blocks))

    def settle(self, forest: Forest | None) -> None:
        """Mark what has become reusable, and take away the marks of what is not. `forest`: the primary group's blocks."""
        if not self._dirty:
            return
        self._predecessors.forest, self._predecessors.lookahead = forest, self.lookahead
        self._link_sparse()
        for block in list(self._dirty):
            for group in self._groups.values():
                self.touch(group.known(block))
        if forest is not None and self.primary is not None:
            changed = list(self._dirty)
            for _ in range(self.drop // self.specs[self.primary].block_size):
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
        self.specs.clear()
        self._groups.clear()
        self.primary, self.lookahead, self.reserve = None, 0, 1
        self._set_rule()

    @property
    def has_states(self) -> bool:
        """Whether a group of mamba states decides with others what is reused."""
        return len(self.specs) > 1 and any(spec.kind is Kind.MAMBA for spec in self.specs.values())

    def forget_drops(self) -> None:
        """Expect another engine: nothing is known of its drops."""
        self._drops, self.drop_is_settled = frozenset(), False
        self._set_rule()

    def _end_of(self, forest: Forest, block: int) -> tuple[str, list[int]] | None:
        """Model and hashes of the prefix that ends with `block`; None when it cannot be reused."""
        run = forest.run_of(block)
        if run is None or (block in forest.cut and self.is_rooted):
            return None
        position = run.position(block)
        end = run.end(position)
        if (end - self.drop) % self.unit or end <= self.drop or not self._is_held(forest, run, block, end):
            return None
        ahead = self._ahead.get(block, b"")
        if len(ahead) != 4 * self.lookahead:
            return None
        if not self._groups and end % self._blocks.block_size and self._blocks.block_size % self.unit == 0:
            return None  # every block ends a reusable prefix: those at the ends of token blocks will do
        key, tokens, media = run.ending(position)
        if block in self._media_ahead:
            media = [*media, *((len(tokens) // 4 + at, name) for at, name in self._media_ahead[block])]
        return run.model, [key, self._blocks.end(key, tokens, ahead, media)]

    def _is_held(self, forest: Forest, run: Run, block: int, end: int) -> bool:
        """Whether every other group holds what it must for the prefix that ends with `block`."""
        if not self._drops:
            return all(group.holds(block, end) for group in self._groups.values())
        reused = end - self.drop
        for number, group in self._groups.items():
            at = reused + self._drop_of(number)
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
