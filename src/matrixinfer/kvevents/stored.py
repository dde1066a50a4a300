"""What a BlockStored event means for the blocks it names: new ones, copies or hits, and what their extra keys say. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from matrixinfer.kvevents.forest import Forest
from matrixinfer.kvevents.run import Run
from matrixinfer.kvevents.tiers import DEVICE
from matrixinfer.kvevents.wire import BlockStored


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
    if event.parent_block_hash is not None or event.extra_keys is UNSET or forest.tier != DEVICE or len(ids) < 2:
        return False
    return len(set(ids)) == len(ids) and all(block in forest for block in ids)


def indexable(event: BlockStored, first: int, count: int, *, at_root: bool) -> tuple[int, str | None]:
    """How many of `count` blocks from position `first` on depend only on tokens, adapter and salt; and the salt.

    Extra keys are untagged: `[adapter name, (item, offset) …, salt, digests …]`, each only where present. A salt is the
    only string left on a root block; after anything else nothing more can be indexed.
    """
    if event.lora_id is not None and not event.lora_name:
        return 0, None
    if event.extra_keys is None or event.extra_keys is UNSET or not any(event.extra_keys):
        return count, None
    salt: str | None = None
    for offset, keys in enumerate(event.extra_keys[first : first + count]):
        if not keys:
            continue
        rest = list(keys) if isinstance(keys, (list, tuple)) else [None]
        if event.lora_name and rest[0] == event.lora_name:
            del rest[0]
        if at_root and offset == 0 and len(rest) == 1 and isinstance(rest[0], str):
            salt = rest[0]
        elif rest:
            return offset, salt
    return count, salt
