"""Events as an engine writes them, and what an index holds after them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from matrixinfer.blocks import Medium, TokenBlockProcessor
from matrixinfer.config.endpoint_names import ENDS_SUFFIX
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.wire import EngineHash, decode
from matrixinfer.traffic.history import RoutingHistory

POD, MODEL = "pod-a", "llama"


def stored(
    hashes: Sequence[EngineHash],
    tokens: Sequence[int],
    *,
    parent: EngineHash | None = None,
    block_size: int | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """A BlockStored event of vLLM's; the block size is what the tokens make it unless given."""
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": list(tokens),
        "block_size": len(tokens) // len(hashes) if block_size is None else block_size,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": None,
        **fields,
    }


def removed(hashes: Sequence[EngineHash], **fields: Any) -> dict[str, Any]:
    """A BlockRemoved event."""
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", **fields}


CLEARED = {"type": "AllBlocksCleared"}


def frame(*events: Any, timestamp: float = 1.5, rank: int | None = 0) -> bytes:
    """A batch as it comes over the wire."""
    return msgspec.msgpack.encode([timestamp, events, rank])


class RecordingIndex(MemoryIndex):
    """An index that records its contents.

    A `strict` one trusts its writer less: no block without its parent, not even for a moment, and nothing removed that is
    not there.
    """

    def __init__(self, *, prefix_closed: bool = True, strict: bool = False) -> None:
        super().__init__(prefix_closed=prefix_closed)
        self._strict = strict
        self._held: defaultdict[str, defaultdict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        self._children: defaultdict[int, set[int]] = defaultdict(set)

    def contents(self, pod: str = POD) -> dict[str, set[int]]:
        """The blocks that a pod holds, by model; models without any are absent."""
        return {model: set(blocks) for model, blocks in self._held[pod].items() if blocks}

    def add(self, model: str, pod: str, hashes: Sequence[int], parent: int | None) -> None:
        held = self._held[pod][model]
        assert not self._strict or parent is None or parent in held or not self.prefix_closed
        held.update(hashes)
        if not pod.endswith(ENDS_SUFFIX):
            for before, block in pairwise(hashes if parent is None else [parent, *hashes]):
                self._children[before].add(block)
        super().add(model, pod, hashes, parent)

    def remove(self, model: str, pod: str, hashes: Iterable[int]) -> None:
        gone, held = list(hashes), self._held[pod][model]
        assert not self._strict or held.issuperset(gone)
        for block in gone:
            held.discard(block)
            if self._strict and self.prefix_closed and not pod.endswith(ENDS_SUFFIX):
                assert held.isdisjoint(self._children.get(block, ()))
        super().remove(model, pod, gone)

    def clear(self, pod: str) -> None:
        self._held.pop(pod, None)
        super().clear(pod)

    def forget(self, pod: str) -> None:
        self._held.pop(pod, None)
        super().forget(pod)


class Follower:
    """A ledger, the index that it feeds, and short ways to drive and read them."""

    def __init__(
        self, blocks: TokenBlockProcessor, history: RoutingHistory | None = None, *, strict: bool = True
    ) -> None:
        self.blocks = blocks
        self.index = RecordingIndex(prefix_closed=blocks.scheme == "prefix", strict=strict)
        self.ledger = Ledger(pod=POD, model=MODEL, blocks=blocks, index=self.index, history=history)

    def apply(self, *events: Any) -> None:
        """Apply events through their wire format: maps, arrays, or both."""
        batch = decode(frame(*events))
        assert batch.unreadable == 0
        self.ledger.apply(*batch.events)

    def held(
        self, tokens: Sequence[int], *, model: str = MODEL, salt: str | None = None, media: Sequence[Medium] = ()
    ) -> int:
        """Tokens of a prompt that the index says the pod holds."""
        chain = self.blocks.chain(tokens, salt=salt, media=media)
        return self.index.count(model, chain).get(POD, 0) * self.blocks.block_size

    def hit(self, tokens: Sequence[int], engine_block: int, *, media: Sequence[Medium] = ()) -> int:
        """Tokens of a prompt that an engine with blocks of `engine_block` tokens has, according to the index."""
        chain = self.blocks.chain(tokens, media=media)
        blocks = self.index.count(MODEL, chain).get(POD, 0)
        tail = chain.tail(blocks, engine_block)
        more = tail[0] if tail and self.index.count(MODEL, tail[1:]) else 0
        return (blocks * self.blocks.block_size + more) // engine_block * engine_block

    @property
    def total(self) -> int:
        """Token blocks held, over all models."""
        return sum(map(len, self.index.contents().values()))
