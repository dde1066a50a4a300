"""Finds the longest reusable prefix of a prompt, where not every prefix that an endpoint holds can be reused.

Such endpoints have marks in the index (`matrixinfer.kvevents.reusable`): of blocks with reusable ends in them, and of
the ends themselves. The search asks first for the last block, then for the place in it: two questions, as a rule.

It does no I/O: `search` is a generator that yields questions for `BlockIndex.last` and is sent the answers.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from matrixinfer.blocks import BlockChain

_MAX_ROUNDS = 8
"""Blocks tried per endpoint: a mark of a block may be of another prompt that goes on differently."""


class Rule(NamedTuple):
    """How the reusable ends of an endpoint are found."""

    unit: int
    """Prefixes are multiples of this many tokens."""
    ahead: int = 0
    """Tokens after a prefix that decide as well whether it is reused."""
    reserve: int = 1
    """Tokens at a prompt's end that are never reused."""
    drop: int = 0
    """Tokens by which each prefix is cut before it is reused."""
    is_rooted: bool = True
    """Whatever is reused is held from the first token on, so that a match bounds it."""


Question: TypeAlias = tuple[Collection[str], Sequence[int]]
"""Arguments of `BlockIndex.last`: names of endpoints' ends, and hashes."""


def search(
    names: Collection[str], chain: BlockChain, rule: Rule, *, tokens: int, blocks: int | None
) -> Generator[Question, Mapping[str, int], dict[str, int]]:
    """Find the longest reusable prefix, in tokens, of a prompt of `tokens` tokens. Names that have none are absent.

    `blocks` is the longest match of those endpoints, which bounds the search where they are rooted; None if not known.
    """
    unit, ahead, drop = rule.unit, rule.ahead, rule.drop
    block_size = chain.block_size
    limit = min(tokens - max(0 if drop else rule.reserve, ahead), chain.tokens - ahead)
    found: dict[str, int] = {}
    if limit < unit or unit < 1:
        return found
    most = (limit - 1) // block_size
    keys = [
        chain.end_key(count)
        for count in range((most if blocks is None or not rule.is_rooted else min(most, blocks)) + 1)
    ]
    pending: dict[int, set[str]] = {len(keys): set(names)}  # names by how many keys are left to ask for
    for _ in range(_MAX_ROUNDS):
        last: dict[int, set[str]] = {}
        for left, asked in pending.items():
            for name, position in (yield asked, keys[:left]).items():
                last.setdefault(position, set()).add(name)
        pending = {}
        for position, asked in last.items():
            first = (position * block_size - drop) // unit * unit + unit + drop
            ends = range(first, min(limit, (position + 1) * block_size) + 1, unit)
            places = (yield asked, [chain.end(end, ahead) for end in ends]) if ends else {}
            found.update((name, ends[place] - drop) for name, place in places.items())
            if position and (rest := asked - places.keys()):
                pending[position] = rest
        if not pending:
            break
    return found
