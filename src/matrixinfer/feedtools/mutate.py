"""Ledgers that misread events on purpose, to show that a check of captures notices it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.wire import AllBlocksCleared, BlockRemoved, BlockStored, EngineHash, Event


class _Misreading(Ledger, ABC):
    def apply(self, *events: Event) -> None:
        super().apply(*(misread for event in events if (misread := self.misread(event)) is not None))

    @abstractmethod
    def misread(self, event: Event) -> Event | None:
        """What the ledger applies in place of the event; None for nothing."""


class _TakesCopiesForOne(_Misreading):
    """Removes all copies of a block at once, as a ledger that does not count copies would."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._stored: Counter[tuple[str | None, int | None, EngineHash]] = Counter()

    def misread(self, event: Event) -> Event:
        if isinstance(event, BlockStored):
            self._stored.update((event.medium, event.group_idx, name) for name in event.block_hashes)
        elif isinstance(event, BlockRemoved):
            copies = [self._stored.pop((event.medium, event.group_idx, name), 1) for name in event.block_hashes]
            names = [name for name, count in zip(event.block_hashes, copies, strict=True) for _ in range(count)]
            return msgspec.structs.replace(event, block_hashes=names)
        else:
            self._stored.clear()
        return event


class _IgnoresClears(_Misreading):
    def misread(self, event: Event) -> Event | None:
        return None if isinstance(event, AllBlocksCleared) else event


class _IgnoresRemovals(_Misreading):
    def misread(self, event: Event) -> Event | None:
        return None if isinstance(event, BlockRemoved) else event


class _IgnoresExtraKeys(_Misreading):
    def misread(self, event: Event) -> Event:
        return msgspec.structs.replace(event, extra_keys=None) if isinstance(event, BlockStored) else event


MUTATIONS: Mapping[str, type[Ledger]] = MappingProxyType(
    {
        "copies": _TakesCopiesForOne,
        "clear": _IgnoresClears,
        "removed": _IgnoresRemovals,
        "salt": _IgnoresExtraKeys,
    }
)
"""Ledgers by what they ignore: copies, AllBlocksCleared, BlockRemoved, extra keys."""
