"""What stored events mean for the blocks they name: new ones, copies or hits, and what their extra keys say. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any, NamedTuple, TypeGuard

import msgspec
from msgspec import UNSET

from matrixinfer.blocks import Medium, token_bytes
from matrixinfer.kvevents.forest import Forest
from matrixinfer.kvevents.run import Run
from matrixinfer.kvevents.tiers import DEVICE, tier_of
from matrixinfer.kvevents.wire import BlockRemoved, BlockStored, Event, block_ids, pairs_of, tokens_of

_NO_TOKENS = (b"\x90", b"\xc0")
"""An empty list and nil."""
_TOKENS = msgspec.msgpack.Decoder(list[int])


def all_new(forest: Forest, parent: int | None, above: Run | None, ids: Sequence[int]) -> bool:
    """A quick check that none of `ids`, which follow `parent` in the run `above`, is present.

    A block has only one parent, and what follows a new block is new. This holds while no block is present without its
    parent.
    """
    if forest.cut or forest.ended or (above is None and parent is not None):
        return False
    return not forest.has_child(parent, above, ids[0]) and len(set(ids)) == len(ids)


def is_reported_again(forest: Forest, event: BlockStored, ids: Sequence[int]) -> bool:
    """Whether the event reports blocks that a request found in the cache, as vLLM can be asked to do, and not copies.

    That is not certain. But blocks that are found begin at the root and are all present, and copies begin where the
    engine's lookup ended. Copies of several blocks from the root on come from requests that do not read the cache; they
    are rare, and missing one predicts a smaller hit, not a larger one. A single block is a prompt of exactly that block,
    sent twice.
    """
    if event.parent_block_hash is not None or event.hides_keys or forest.tier != DEVICE or len(ids) < 2:
        return False
    return len(set(ids)) == len(ids) and all(block in forest for block in ids)


class Indexable(NamedTuple):
    """What of some blocks depends only on what is known: tokens, adapter, salt and named media."""

    usable: int
    """How many of the blocks, from the first on."""
    salt: str | None = None
    media: Sequence[Medium] = ()
    """Those that begin in these blocks, counted from the first block's first token."""


def indexable(event: BlockStored, first: int, count: int, *, at_root: bool) -> Indexable:
    """What can be indexed of `count` blocks from position `first` on.

    Extra keys are untagged: `[adapter name, (item, offset) …, salt, digests …]`, each only where present. A salt is the
    only string left on a root block; after anything else nothing more can be indexed.
    """
    if event.lora_id is not None and not event.lora_name:
        return Indexable(0)
    if isinstance(event.mm_keys, list):
        count = next((at for at, keys in enumerate(event.mm_keys[first : first + count]) if keys), count)
    if event.extra_keys is None or event.extra_keys is UNSET or not any(event.extra_keys):
        return Indexable(count)
    salt: str | None = None
    media: list[Medium] = []
    for offset, keys in enumerate(event.extra_keys[first : first + count]):
        if not keys:
            continue
        items = list(keys) if isinstance(keys, (list, tuple)) else [None]
        if event.lora_name and items[0] == event.lora_name:
            del items[0]
        begin = [key for key in items if is_medium(key, _covered(event))]
        rest = [key for key in items if key not in begin]
        if at_root and offset == 0 and len(rest) == 1 and isinstance(rest[0], str):
            salt = rest[0]
        elif rest:
            return Indexable(offset, salt, media)
        media += sorted((offset * event.block_size + at, name) for name, at in begin if 0 <= at < event.block_size)
    return Indexable(count, salt, media)


def media_ahead(event: BlockStored) -> Iterator[tuple[int, list[Medium]]]:
    """The media that begin among the tokens after a block on which it depends as well, counted from its end.

    Yields the block's position in the event, and those media.
    """
    if event.lookahead and isinstance(event.extra_keys, list):
        size, covered = event.block_size, _covered(event)
        for position, keys in enumerate(event.extra_keys):
            found = [key for key in keys if is_medium(key, covered)] if isinstance(keys, (list, tuple)) else []
            media = sorted((at - size, name) for name, at in found if at >= size)
            if media:
                yield position, media


def _covered(event: BlockStored) -> int:
    """Tokens from a block's beginning on which it depends."""
    return event.block_size + (len(event.lookahead[0]) if event.lookahead else 0)


def is_medium(key: object, tokens: int) -> TypeGuard[tuple[str, int]]:
    """Whether an extra key names a medium, and where it begins: among so many tokens or, if negative, before them."""
    if not isinstance(key, (list, tuple)) or len(key) != 2:
        return False
    name, start = key
    return isinstance(name, str) and type(start) is int and start < tokens


def keys_of_whole(pieces: Sequence[object], size: int, adapter: str | None) -> list[Any] | None:
    """The extra keys of a block made of `pieces` of `size` tokens, from theirs."""
    whole: list[Any] = []
    for number, keys in enumerate(pieces):
        for key in keys if isinstance(keys, (list, tuple)) else [keys] * (keys is not None):
            if is_medium(key, 2 * size):
                # Not what began in an earlier piece, nor what the next one has too.
                if (key[1] >= 0 or not number) and (key[1] < size or number == len(pieces) - 1):
                    whole.append((key[0], key[1] + number * size))
            elif not number or key != adapter:
                whole.append(key)
    return whole or None


def is_bare(event: BlockStored) -> bool:
    """Whether the event names off-loaded blocks without their tokens, which are known from the device."""
    medium = event.medium
    if medium is None or medium == "GPU" or not event.block_hashes or tier_of(medium) == DEVICE:
        return False
    return event.block_size == 0 or bytes(event.token_ids) in _NO_TOKENS


def tokens_of_chunk(event: BlockStored) -> bytes | None:
    """The tokens of one chunk of a connector, some of which also publish the first token after it; None for the rest."""
    try:
        tokens = _TOKENS.decode(event.token_ids)
        if len(event.block_hashes) != 1 or len(tokens) != event.block_size + 1:
            return None
        return token_bytes(tokens[:-1])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError):
        return None


def tokens_in(event: BlockStored, tier: int) -> tuple[bytes | None, list[bytes] | None]:
    """The tokens of an event's blocks, None if they do not fit; and those after each block, if it is of pairs."""
    tokens = tokens_of(event) if event.block_size > 0 and event.block_hashes else None
    if tokens is None and tier != DEVICE:
        tokens = tokens_of_chunk(event)
    pairs = None if tokens is not None else pairs_of(event)
    return (tokens, None) if pairs is None else pairs


def in_order(events: Sequence[Event], stored: Sequence[BlockStored]) -> Sequence[Event]:
    """The events such that blocks are off-loaded without their tokens before the device drops them.

    `stored` are the stores among them.

    An engine may publish the removal first, but the off-loaded blocks are those that the device had.
    """
    if not any(map(is_bare, stored)):
        return events
    bare = [
        (position, event) for position, event in enumerate(events) if isinstance(event, BlockStored) and is_bare(event)
    ]
    wanted = {block for _, event in bare for block in block_ids(event.block_hashes)}
    late: list[Event] = []
    ordered: list[Event] = []
    for position, event in enumerate(events):
        now: Event = event
        if isinstance(event, BlockRemoved):
            if position < bare[-1][0] and tier_of(event.medium or "GPU") == DEVICE:
                later = [block in wanted for block in block_ids(event.block_hashes)]
                if any(later):
                    late.append(_only(event, later))
                    now = _only(event, [not is_late for is_late in later])
        elif not isinstance(event, BlockStored):
            ordered += late  # a clear: what comes after it is about other blocks
            late = []
        ordered.append(now)
        if position == bare[-1][0]:
            ordered += late
    return ordered


def _only(event: BlockRemoved, chosen: Sequence[bool]) -> BlockRemoved:
    """The removal of the chosen blocks alone."""
    return msgspec.structs.replace(event, block_hashes=list(compress(event.block_hashes, chosen)))
