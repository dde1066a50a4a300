"""What a whole capture says of its engine before its prompts are predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from msgspec import UNSET

from matrixinfer.feedtools.mutate import ClearsEveryTier, IgnoresConnectors, RemovesEveryTenant, TakesCopiesForOne
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.stored import is_bare
from matrixinfer.kvevents.tiers import DEVICE, tier_of
from matrixinfer.kvevents.wire import Batch, BlockRemoved, BlockStored, Event, MalformedFrame, block_ids, decode

Row: TypeAlias = Mapping[str, Any]

COPIES = (
    "a block stored several times was removed once, and the events never show whether that was one copy or the last"
)
RESET = "a cache reset may have reached the slower tiers or spared them"
STORE_ONLY = "it rests on a tier that publishes no evictions"
SHARED_PAGES = "it rests on pages that several salts or adapters share, and a removal does not say whose page went"
COMPONENTS = "SGLang does not publish which sliding windows and mamba states it holds"
FINE_HITS = "prefix_match_unit below the block size hides the last tokens of hits"
EXTRA_KEY = "the events do not show a client's `extra_key`"
EXTRA_KEY_SHARED = "it shares pages with prompts that have an `extra_key`, which the events do not show"


class Facts:
    """Reads every row of a capture once."""

    def __init__(self) -> None:
        self.publishers: dict[str, None] = {}  # an ordered set
        self.adapters: set[str] = set()
        self.requests = False
        self.hides_salts = False
        self.hides_adapters = False
        self.groups: list[Row] = []
        """What `meta` says of attention groups, where it does: of all that, events leave out the chunk and the drop."""
        self.drops: list[int] = []
        self.components = False
        """SGLang has sliding windows or mamba states, of which it publishes nothing."""
        self.fine_hits = False
        """Hits may end within a block."""
        self._device_block: int | None = None
        self._other_block: int | None = None
        self._copies: dict[str, _Copies] = {}
        self._is_annotated = False
        self._offloads = self._clears = self._has_tenants = False
        self._connectors: set[str] = set()
        self._evicting: set[str] = set()

    @property
    def engine_block(self) -> int | None:
        """The engine's block size; None if no event shows it."""
        return self._device_block or self._other_block

    def readings(self) -> Iterator[tuple[str, type[Ledger]]]:
        """Other ways to read the events, none of which they contradict, and what they leave open."""
        if any(copies.are_doubtful for copies in self._copies.values()):
            yield COPIES, TakesCopiesForOne
        if self._offloads and self._clears:
            yield RESET, ClearsEveryTier
        if self._connectors - self._evicting:
            yield STORE_ONLY, IgnoresConnectors
        if self._has_tenants:
            yield SHARED_PAGES, RemovesEveryTenant

    def learn(self, row: Row) -> None:
        """Take the next row."""
        kind = row.get("kind")
        if kind == "meta":
            self._learn_meta(row)
        elif kind == "request":
            self.requests = True
        elif kind == "event":
            name = publisher(row)
            self.publishers[name] = None
            batch = batch_of(row)
            for event in () if batch is None else batch.events:
                self._copies.setdefault(name, _Copies()).take(event)
                self._learn_event(event)

    def _learn_meta(self, row: Row) -> None:
        models = row.get("models", {}).get("data", ())
        self.adapters |= {model["id"] for model in models if model.get("parent")}
        self.groups = row.get("groups") or []
        if row.get("use_eagle"):
            self.drops = [number for number, group in enumerate(self.groups) if group.get("eagle")]
        self.components = bool(
            {*(row.get("components") or ())} - {"FULL"} or row.get("mamba_slots") or row.get("window")
        )
        self.fine_hits = bool(row.get("partial_hash_hits"))

    def _learn_event(self, event: Event) -> None:
        if isinstance(event, BlockRemoved):
            self._evicting.add(event.medium or "GPU")
            return
        if not isinstance(event, BlockStored):
            self._clears = True
            return
        medium = event.medium or "GPU"
        is_on_device = tier_of(medium) == DEVICE
        if is_on_device and event.block_size > 0:
            self._device_block = self._device_block or event.block_size
        elif event.block_size > 0:
            self._other_block = self._other_block or event.block_size
        self._offloads |= not is_on_device
        if not is_on_device and not is_bare(event):
            self._connectors.add(medium)
        self._is_annotated |= event.is_annotated
        self.hides_salts = (self.hides_salts or event.hides_keys or event.is_of_tensorrt) and not self._is_annotated
        self.hides_adapters = (
            self.hides_adapters or (event.hides_keys and event.lora_name is UNSET)
        ) and not self._is_annotated
        self._has_tenants |= event.is_of_radix_tree and bool(event.salt is not None or event.lora_name)


class _Copies:
    """Whether one publisher's removals show that each is of one copy.

    A block removed twice in a row had copies. One removed once after it was stored twice may have, or may be gone.
    """

    def __init__(self) -> None:
        self._copies: Counter[tuple[str, int, int]] = Counter()
        self._removed_once: set[tuple[str, int, int]] = set()
        self._is_known = False
        self._is_doubtful = False

    @property
    def are_doubtful(self) -> bool:
        """Nothing shows it, and it matters."""
        return self._is_doubtful and not self._is_known

    def take(self, event: Event) -> None:
        """Take the next event."""
        if isinstance(event, BlockStored | BlockRemoved):
            blocks = [(event.medium or "GPU", event.group_idx or 0, block) for block in block_ids(event.block_hashes)]
            if isinstance(event, BlockRemoved):
                self._remove(blocks)
            elif event.is_of_radix_tree:
                self._is_known = True  # there are no copies in a tree
            else:
                self._copies.update(blocks)
                self._removed_once.difference_update(blocks)
        else:
            self._copies.clear()
            self._removed_once.clear()

    def _remove(self, blocks: list[tuple[str, int, int]]) -> None:
        for block in blocks:
            if block in self._removed_once:
                self._is_known = True
            if self._copies[block] > 1:
                self._copies[block] -= 1
                self._removed_once.add(block)
                self._is_doubtful = True
            else:
                del self._copies[block]
                self._removed_once.discard(block)


def publisher(row: Row) -> str:
    """The publisher of an event; empty if the capture has only one."""
    return str(row.get("port", ""))


def batch_of(row: Row) -> Batch | None:
    """The frame's events; None if it cannot be read."""
    try:
        return decode(bytes.fromhex(row["payload_hex"]))
    except (MalformedFrame, KeyError, TypeError, ValueError):
        return None
