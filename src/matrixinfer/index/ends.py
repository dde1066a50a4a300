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
    """Tokens at a prompt's end in which no prefix may end, before it is cut."""
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
    limit = min(tokens - max(rule.reserve, ahead), chain.tokens - ahead)
    found: dict[str, int] = {}
    if limit < unit or unit < 1:
        return found
    most = (limit - 1) // block_size
    longest = most if blocks is None or not rule.is_rooted else min(most, blocks)
    keys = [chain.end_key(0), *chain[:longest]]
    pending: dict[int, set[str]] = {len(keys): set(names)}  # names by how many keys are left to ask for
    for _ in range(_MAX_ROUNDS):
        last: dict[int, set[str]] = {}
        for left, asked in pending.items():
            for name, position in (yield asked, keys[:left]).items():
                last.setdefault(position, set()).add(name)
        # Ends in all these blocks at once, as a question may be a round trip. Where a name holds one in another's block
        # only, blocks between that one and its own may have longer ones.
        tried = [(place, end) for place in sorted(last) for end in _ends_in(place, block_size, limit, unit, drop)]
        pending = {}
        places: Mapping[str, int] = {}
        if tried:
            places = yield (
                {name for asked in last.values() for name in asked},
                [chain.end(end, ahead) for _, end in tried],
            )
        for position, asked in last.items():
            for name in asked:
                at, end = tried[places[name]] if name in places else (None, 0)
                if at == position:
                    found[name] = end - drop
                elif position:
                    pending.setdefault(position, set()).add(name)
        if not pending:
            break
    return found


def _ends_in(position: int, block_size: int, limit: int, unit: int, drop: int) -> range:
    """The ends that a reusable prefix may have in the block at `position`."""
    first = (position * block_size - drop) // unit * unit + unit + drop
    return range(first, min(limit, (position + 1) * block_size) + 1, unit)
