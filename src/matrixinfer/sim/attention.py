"""Kinds of attention: which blocks of a prefix each needs, keeps and caches (vLLM 0.32 and 0.33).

A model has one or more groups of layers. Each group has blocks of its own, and a prefix is reused only where every group
has what it needs of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import gcd, lcm

FULL = ("full_attention", "mla_attention", "sink_full_attention")
WINDOWS = ("sliding_window", "sliding_window_mla")
MAMBA = "mamba"
CHUNKED = "chunked_local_attention"
_NAMES = {
    "full": "full_attention",
    "mla": "mla_attention",
    "sink_full": "sink_full_attention",
    "sliding": "sliding_window",
    "sliding_mla": "sliding_window_mla",
    "mamba": MAMBA,
    "chunked": CHUNKED,
}
_TEXT = re.compile(r"(?P<kind>[a-z_]+)(?::(?P<span>[1-9]\d*))?(?:@(?P<size>[1-9]\d*))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """An attention group."""

    kind: str = FULL[0]
    """As events name it."""
    block_size: int
    span: int | None = None
    """Window or chunk, in tokens."""

    @classmethod
    def parse(cls, text: str, block_size: int) -> Group:
        """Read `KIND[:SPAN][@BLOCK_SIZE]`, such as `full`, `sliding:1024` or `mla@64`. Raises `ValueError`."""
        match = _TEXT.fullmatch(text)
        kind = _NAMES.get(match["kind"]) if match else None
        if match is None or kind is None:
            kinds = ", ".join(_NAMES)
            raise ValueError(f"expected an attention KIND[:TOKENS][@BLOCK_SIZE], with one of {kinds}; got `{text}`")
        has_span = kind in (*WINDOWS, CHUNKED)
        if has_span != (match["span"] is not None):
            raise ValueError(f"expected a number of tokens after `:` for windows and chunks only, got `{text}`")
        span = int(match["span"]) if has_span else None
        return cls(kind=kind, block_size=int(match["size"] or block_size), span=span)

    @property
    def is_full(self) -> bool:
        """Whether it reads every block of a prefix."""
        return self.kind in FULL

    @property
    def window(self) -> int | None:
        """Tokens of a sliding window, which events name."""
        return self.span if self.kind in WINDOWS else None

    @property
    def blocks_for_hit(self) -> int:
        """Consecutive blocks at a prefix's end that a sliding window needs."""
        return -(-((self.span or 1) - 1) // self.block_size)

    def skipped(self, computed: int) -> int:
        """How many of `computed` tokens, from the start, the next one does not read."""
        if self.kind in WINDOWS and self.span is not None:
            return max(0, computed - self.span + 1)
        if self.kind == CHUNKED and self.span is not None:
            return computed // self.span * self.span
        return max(0, computed - 1) if self.kind == MAMBA else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The attention groups of a model, and what changes their blocks."""

    groups: tuple[Group, ...]
    drop: bool = False
    """Speculative decoding that gives up the last block of each hit (vLLM 0.32)."""
    lookahead: int = 0
    """Speculative decoding whose blocks depend on so many tokens after them (vLLM 0.33)."""
    dense: bool = False
    """Windows and states are cached at every block, not only where a prompt ends or branches off."""

    def __post_init__(self) -> None:
        kinds, sizes = {group.kind for group in self.groups}, {group.block_size for group in self.groups}
        if not self.groups:
            raise ValueError("expected at least one attention group")
        if len(sizes) > 1 and not kinds.isdisjoint((MAMBA, CHUNKED)):
            raise ValueError("expected the same block size in every group beside mamba and chunked attention")
        if self.drop and self.lookahead:
            raise ValueError("expected speculative decoding that drops blocks or looks ahead, not both")
        if self.lookahead > min(sizes):
            raise ValueError("expected fewer lookahead tokens than tokens per block")
        if any(self.groups[number].kind == CHUNKED for number in self.dropping):
            raise ValueError("expected no dropped blocks with chunked attention alone")

    @property
    def unit(self) -> int:
        """Hits are multiples of it."""
        return lcm(*(group.block_size for group in self.groups))

    @property
    def hash_size(self) -> int:
        """Tokens between two hashes."""
        return gcd(*(group.block_size for group in self.groups))

    @property
    def dropping(self) -> tuple[int, ...]:
        """The groups that drop a block: that of the draft model, which has full attention, or else all."""
        if not self.drop:
            return ()
        full = [number for number, group in enumerate(self.groups) if group.is_full]
        return tuple(full[:1] or range(len(self.groups)))

    def capacity(self, num_blocks: int) -> int:
        """Tokens that certainly fit into `num_blocks` blocks."""
        return num_blocks // sum(self.unit // group.block_size for group in self.groups) * self.unit

    def boundaries(self, prompt: int, junction: int) -> list[int]:
        """Tokens after which a prompt like this one can be resumed: its end, and where others branched off."""
        if self.drop:
            ends = {max(0, end // self.unit * self.unit - self.unit) for end in (prompt - 1, prompt)}
        else:
            ends = {prompt - 1}
        return sorted(ends) + ([junction] if junction else [])

    def kept(self, number: int, first: int, last: int, boundaries: Iterable[int]) -> Sequence[bool]:
        """Which of the blocks [first, last) of a group are cached."""
        group, drops = self.groups[number], number in self.dropping
        everything = [True] * (last - first)
        if group.kind == MAMBA and not self.dense:
            ends = {end // self.unit * self.unit // group.block_size for end in boundaries}
            return [block + 1 in ends for block in range(first, last)]
        if group.kind not in WINDOWS:
            return everything
        need = group.blocks_for_hit + drops
        if self.dense:
            per_unit = self.unit // group.block_size
            if need >= per_unit:
                return everything
            return [block >= drops and (block - drops) % per_unit >= per_unit - need for block in range(first, last)]
        ends = {end // self.unit * self.unit // group.block_size + drops for end in boundaries}
        return [any(end - need <= block < end for end in ends) for block in range(first, last)]
