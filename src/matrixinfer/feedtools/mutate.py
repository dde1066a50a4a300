"""Ledgers that read events in another way.

Some misread them on purpose, to show that a check of captures notices it. Others read them in a way that the events do
not contradict: a prompt whose hit depends on the reading cannot be predicted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec
from msgspec import UNSET

from matrixinfer.kvevents.groups import Kind, kind_of
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.tiers import DEVICE, tier_of
from matrixinfer.kvevents.wire import AllBlocksCleared, BlockRemoved, BlockStored, EngineHash, Event, pairs_of


class _Misreading(Ledger, ABC):
    def apply(self, *events: Event) -> None:
        super().apply(*(misread for event in events if (misread := self.misread(event)) is not None))

    @abstractmethod
    def misread(self, event: Event) -> Event | None:
        """What the ledger applies in place of the event; None for nothing."""


class TakesCopiesForOne(_Misreading):
    """Removes all copies of a block at once, as a ledger that does not count copies would."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._stored: Counter[tuple[str | None, int | None, EngineHash]] = Counter()

    def misread(self, event: Event) -> Event:
        """Name a block in its first removal as often as it was stored."""
        if isinstance(event, BlockStored):
            self._stored.update((event.medium, event.group_idx, name) for name in event.block_hashes)
        elif isinstance(event, BlockRemoved):
            copies = [self._stored.pop((event.medium, event.group_idx, name), 1) for name in event.block_hashes]
            names = [name for name, count in zip(event.block_hashes, copies, strict=True) for _ in range(count)]
            return msgspec.structs.replace(event, block_hashes=names)
        else:
            self._stored.clear()
        return event


class ClearsEveryTier(Ledger):
    """Takes a reset of the device for one of every tier."""

    def _clear_device(self) -> None:
        self.clear()


class IgnoresConnectors(_Misreading):
    """Takes what a connector stored for evicted: blocks on slower tiers that come with their tokens."""

    def misread(self, event: Event) -> Event | None:
        """Leave out what a connector stored."""
        is_dense = isinstance(event, BlockStored) and event.block_size > 0 and tier_of(event.medium or "GPU") != DEVICE
        return None if is_dense else event


class RemovesEveryTenant(Ledger):
    """Takes the removal of a page for one of every salt and adapter that shares its hash."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._reader.pages.keeps_twins = False


class _IgnoresClears(_Misreading):
    def misread(self, event: Event) -> Event | None:
        return None if isinstance(event, AllBlocksCleared) else event


class _IgnoresRemovals(_Misreading):
    def misread(self, event: Event) -> Event | None:
        return None if isinstance(event, BlockRemoved) else event


class _IgnoresExtraKeys(_Misreading):
    def misread(self, event: Event) -> Event:
        if not isinstance(event, BlockStored):
            return event
        keys = event.extra_keys if event.extra_keys is UNSET else None
        return msgspec.structs.replace(event, extra_keys=keys, cache_salt=None)


class _IgnoresGroups(_Misreading):
    """Believes the group of full attention alone, or the first group without it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._kinds: dict[int, Kind | None] = {}

    def misread(self, event: Event) -> Event | None:
        if isinstance(event, AllBlocksCleared):
            return event
        group = event.group_idx or 0
        if isinstance(event, BlockStored):
            self._kinds[group] = kind_of(event)
        full = [number for number, kind in self._kinds.items() if kind is Kind.FULL]
        return event if group == min(full or self._kinds, default=group) else None


class _IgnoresWindows(_Misreading):
    """Takes sliding windows for full attention, in that a prefix needs every block of theirs."""

    def misread(self, event: Event) -> Event:
        return (
            msgspec.structs.replace(event, kv_cache_spec_sliding_window=None)
            if isinstance(event, BlockStored)
            else event
        )


class _IgnoresLookahead(_Misreading):
    """Takes blocks that depend on tokens after them for such that do not."""

    def misread(self, event: Event) -> Event:
        if not isinstance(event, BlockStored):
            return event
        pairs = pairs_of(event) if event.is_of_radix_tree else None
        if pairs is None:
            return msgspec.structs.replace(event, lookahead_token_ids=None)
        first = [int.from_bytes(pairs[0][at : at + 4], "big") for at in range(0, len(pairs[0]), 4)]
        return msgspec.structs.replace(event, token_ids=msgspec.Raw(msgspec.msgpack.encode(first)))


MUTATIONS: Mapping[str, type[Ledger]] = MappingProxyType(
    {
        "copies": TakesCopiesForOne,
        "clear": _IgnoresClears,
        "removed": _IgnoresRemovals,
        "salt": _IgnoresExtraKeys,
        "groups": _IgnoresGroups,
        "window": _IgnoresWindows,
        "lookahead": _IgnoresLookahead,
    }
)
"""Ledgers by what they ignore: copies, AllBlocksCleared, BlockRemoved, extra keys and salts, other attention groups, the
size of windows, the tokens after a block."""
