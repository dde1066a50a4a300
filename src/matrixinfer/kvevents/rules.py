"""What an engine's attention groups are, and what follows from that for the prefixes that it reuses.

Events say which groups there are, their kinds, windows and block sizes, and on how many tokens after a block its content
depends. Whether an engine drops a block of each hit (speculative decoding of vLLM 0.32) only its answers say.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import lcm
from typing import NamedTuple

from matrixinfer.index.ends import Rule
from matrixinfer.kvevents.groups import Kind


class Spec(NamedTuple):
    """What the events say of an attention group."""

    kind: Kind
    block_size: int
    """Tokens per block; the largest, where events have several sizes."""
    span: int | None
    """Window or chunk in tokens, where there is one and events say it."""
    has_fine_blocks: bool = False
    """Some events have smaller blocks than others."""


class Rules:
    """The rules of one engine. One group is the `primary` one: its blocks are indexed, with all their tokens."""

    def __init__(self) -> None:
        self.specs: dict[int, Spec] = {}
        self.primary: int | None = None
        """The group whose blocks are indexed; None before the first event."""
        self.lookahead = 0
        """Tokens after a block on which its content depends as well."""
        self.reserve = 1
        """Tokens at a prompt's end that are never reused."""
        self.rule: Rule | None = None
        """How the marks are searched; None where every prefix that is held is reused."""
        self.counts_copies = False
        """Whether a block that is stored again is a copy, and never a hit that is reported."""
        self.drop_is_settled = False
        """Whether answers have confirmed `drop`, so that a later answer with less says something else."""
        self._drops: frozenset[int] = frozenset()
        self._chunks: dict[int, int] = {}
        self._plain: tuple[int, int] | None = None
        self.is_rooted = True
        """Whether a reusable prefix is held from its first token on; not so where the primary group slides."""

    def is_plain(self, group: int, block_size: int) -> bool:
        """Whether an event of that group, with blocks of that size, says nothing new of the only group."""
        return self._plain == (group, block_size)

    @property
    def unit(self) -> int:
        """Reusable prefixes are multiples of this many tokens; 0 before the first event."""
        return lcm(*(spec.block_size for spec in self.specs.values())) if self.specs else 0

    @property
    def primary_size(self) -> int:
        """Tokens per block of the primary group; 0 before the first event."""
        return 0 if self.primary is None else self.specs[self.primary].block_size

    @property
    def drop(self) -> int:
        """Tokens by which the engine cuts each prefix that it holds before it reuses it; 0 unless it is known to."""
        if not self._drops or self.primary is None:
            return 0
        size = self.primary_size  # the primary group's blocks say which tokens there are
        return max(-(-self.drop_of(number) // size) * size for number in self.specs)

    @property
    def drops_unevenly(self) -> bool:
        """Whether the engine drops blocks that are smaller than the primary group's: where they end is not published."""
        size = self.primary_size
        return any(0 < self.drop_of(number) < size for number in self.specs)

    @property
    def drops_beyond(self) -> bool:
        """Whether another group must hold more beyond a prefix than the primary one, whose blocks there may be gone."""
        return self.primary is not None and self.drop > self.drop_of(self.primary)

    def drop_of(self, group: int) -> int:
        """Tokens that a group must hold beyond a prefix that is reused."""
        spec = self.specs[group]
        return spec.block_size if group in self._drops and spec.kind in (Kind.FULL, Kind.SLIDING) else 0

    @property
    def has_states(self) -> bool:
        """Whether a group of mamba states decides with others what is reused."""
        return len(self.specs) > 1 and any(spec.kind is Kind.MAMBA for spec in self.specs.values())

    def learn(self, group: int, kind: Kind, block_size: int, span: int | None) -> bool:
        """An event of `group` has blocks of that kind and size. Returns whether that is new."""
        span = self._chunks.get(group, span)
        known = self.specs.get(group)
        if known is not None:
            if block_size == known.block_size or (block_size < known.block_size and known.has_fine_blocks):
                return False
            block_size, span = max(block_size, known.block_size), span or known.span
        self.specs[group] = Spec(kind, block_size, span, known is not None)
        full = [number for number, spec in self.specs.items() if spec.kind is Kind.FULL]
        candidates = [number for number in full if number in self._drops] or full or list(self.specs)
        if self.primary not in candidates:
            self.primary = min(candidates)
        self._set_rule()
        return True

    def look_ahead(self, tokens: int) -> None:
        """Blocks depend on so many tokens after them."""
        if tokens > self.lookahead:
            self.lookahead = tokens
            self._set_rule()

    def look_ahead_in_pairs(self) -> None:
        """Blocks are of pairs of tokens, of which the engine never looks up a prompt's last one."""
        self.reserve = 2
        self._set_rule()

    def chunks(self, group: int, tokens: int) -> None:
        """The group's attention works in chunks of that many tokens, which no event says."""
        self._chunks[group] = tokens

    def drops(self, groups: Iterable[int]) -> None:
        """The engine looks for one block more than it reuses in these groups, as vLLM 0.32 does with EAGLE or MTP.

        No event says so.
        """
        self._drops = frozenset(groups)
        self._set_rule()

    def forget_drops(self) -> None:
        """Expect another engine: nothing is known of its drops."""
        self._drops, self.drop_is_settled = frozenset(), False
        self._set_rule()

    def reset(self) -> None:
        """Learn of the groups again. What is known of drops stays."""
        self.specs.clear()
        self.primary, self.lookahead, self.reserve = None, 0, 1
        self._set_rule()

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
        self.counts_copies = self.rule is not None or self.drop > 0
