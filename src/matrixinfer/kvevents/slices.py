"""Cuts long batches into pieces that are applied one after another, so that the event loop can run in between. Pure.

A stored event of many blocks becomes several, each the child of the one before: that is how engines publish long prompts
as well. After each piece the index is as if the engine had published no more yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import msgspec
from msgspec.structs import replace

from matrixinfer.errors import UNREADABLE
from matrixinfer.kvevents.forest import Forest
from matrixinfer.kvevents.wire import AllBlocksCleared, BlockRemoved, BlockStored, Event, block_ids

PIECE_BLOCKS = 256
"""The most blocks, or events, that are applied at once."""
WHOLE_BLOCKS = 8 * PIECE_BLOCKS
"""Events of up to this many blocks are not cut: they are what engines publish every day."""

_LIST = msgspec.msgpack.Decoder(list[Any])
_encode = msgspec.msgpack.Encoder().encode


ForestOf: TypeAlias = Callable[[BlockStored | BlockRemoved], Forest | None]
"""The blocks present where an event is about; None if there are none."""


def slices(events: Sequence[Event], forest_of: ForestOf) -> Iterator[Sequence[Event]]:
    """The events in groups of about `PIECE_BLOCKS` blocks; a longer event in pieces.

    A stored event at the root whose blocks are all present is not cut: it may say that a request found them, and would
    say something else in pieces.
    """
    group: list[Event] = []
    weight = 0
    for event in _joined(events):
        blocks = 0 if isinstance(event, AllBlocksCleared) else len(event.block_hashes)
        if group and weight + blocks >= PIECE_BLOCKS:
            yield group
            group, weight = [], 0
        if isinstance(event, BlockRemoved) and blocks > PIECE_BLOCKS:
            yield from ([piece] for piece in pieces(_last_first(event, forest_of(event))))
        elif isinstance(event, BlockStored) and blocks > WHOLE_BLOCKS and not _is_hit(event, forest_of(event)):
            yield from ([piece] for piece in pieces(event))
        else:
            group.append(event)
            weight += blocks + 1
    if group:
        yield group


def _joined(events: Sequence[Event]) -> Iterator[Event]:
    """The events, with adjacent removals from the same place as one: engines publish one for each block."""
    removed: list[BlockRemoved] = []
    for event in events:
        if removed and not (isinstance(event, BlockRemoved) and _place(event) == _place(removed[0])):
            yield _as_one(removed)
            removed = []
        if isinstance(event, BlockRemoved):
            removed.append(event)
        else:
            yield event
    if removed:
        yield _as_one(removed)


def _as_one(removed: Sequence[BlockRemoved]) -> BlockRemoved:
    if len(removed) == 1:
        return removed[0]
    return replace(removed[0], block_hashes=[block for event in removed for block in event.block_hashes])


def _place(event: BlockRemoved) -> tuple[str | None, int | None]:
    return event.medium, event.group_idx


def _is_hit(event: BlockStored, forest: Forest | None) -> bool:
    if forest is None or event.parent_block_hash is not None:
        return False
    return all(block in forest for block in block_ids(event.block_hashes))


def _last_first(event: BlockRemoved, forest: Forest | None) -> BlockRemoved:
    if forest is None:
        return event
    ids = block_ids(event.block_hashes)
    names = dict(zip(ids, event.block_hashes, strict=True))
    return replace(event, block_hashes=[names[block] for block in forest.last_first(ids)])


def pieces(event: Event) -> Iterator[Event]:
    """An event as several of up to `PIECE_BLOCKS` blocks; as it is where it cannot be cut.

    Of a stored event at the root the first piece is one block: several that are all present would pass for a hit.
    """
    if isinstance(event, BlockRemoved):
        hashes = event.block_hashes
        for start in range(0, len(hashes), PIECE_BLOCKS):
            yield replace(event, block_hashes=hashes[start : start + PIECE_BLOCKS])
        return
    tokens = _tokens(event) if isinstance(event, BlockStored) else None
    if tokens is None or not isinstance(event, BlockStored):
        yield event
        return
    hashes, size = event.block_hashes, event.block_size
    end = 0
    while end < len(hashes):
        start, end = end, end + PIECE_BLOCKS if end or event.parent_block_hash is not None else 1
        yield replace(
            event,
            block_hashes=hashes[start:end],
            parent_block_hash=hashes[start - 1] if start else event.parent_block_hash,
            token_ids=msgspec.Raw(_encode(tokens[start * size : end * size])),
            extra_keys=_part(event.extra_keys, start, end),
            lookahead_token_ids=_part(event.lookahead_token_ids, start, end),
            mm_keys=_part(event.mm_keys, start, end),
        )


def _tokens(event: BlockStored) -> list[Any] | None:
    """The tokens, or pairs of them; None unless they are those of whole blocks."""
    try:
        tokens = _LIST.decode(event.token_ids)
    except UNREADABLE:
        return None
    return tokens if event.block_size > 0 and len(tokens) == len(event.block_hashes) * event.block_size else None


def _part(values: Any, start: int, end: int) -> Any:
    """Some of the values that an event has for each of its blocks."""
    return values[start:end] if isinstance(values, list) else values
