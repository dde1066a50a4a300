"""Looks up prompts in a `matrixinfer.Index`, as the gateway does in its own: blocks, tails and reusable ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from matrixinfer.blocks import BlockChain, TokenBlockProcessor, TokenIds
from matrixinfer.errors import InvalidRequest
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.routing import arguments
from matrixinfer.routing.holdings import Matches, searches, straddled
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.trust.cache_views import FeedCaches

Tokens: TypeAlias = TokenIds | Sequence[int]
"""Token ids: a sequence of integers, or a numpy array of `uint32`, shape (n,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """The parts of an index that selectors read."""

    blocks: TokenBlockProcessor
    memory: MemoryIndex
    caches: FeedCaches
    history: RoutingHistory

    def chain(self, token_ids: Tokens, *, salt: str | None = None, max_blocks: int | None = None) -> BlockChain:
        """The prompt's block hashes. Raises `InvalidRequest`."""
        if salt is not None:
            arguments.text(salt, "salt")
        try:
            return self.blocks.chain(token_ids, salt=salt, max_blocks=max_blocks)
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"salt: expected text that UTF-8 can encode: {error}", param="salt") from error
        except (OverflowError, TypeError, ValueError) as error:
            raise InvalidRequest(f"token_ids: expected integers of 32 bits: {error}", param="token_ids") from error

    def match(self, model: str, chain: BlockChain) -> Matches:
        """What each publisher holds of a prompt, as `routing.lookup` asks it of any index."""
        counts = self.memory.count(model, chain)
        tails: dict[str, int] = {}
        for (tokens, block), names in straddled(chain, counts, self.caches).items():
            holders = self.memory.count(model, [block])
            tails.update((name, tokens) for name in names if name in holders)
        ends: dict[str, tuple[int, int]] = {}
        for publishers, asking in searches(self.caches.names, chain, counts, self.caches):
            try:
                question = next(asking)
                while True:
                    question = asking.send(self.memory.last_of(model, *question))
            except StopIteration as done:
                lengths: dict[str, int] = done.value
                ends.update((publishers[end], divmod(length, chain.block_size)) for end, length in lengths.items())
        return Matches(blocks=counts, tails=tails, ends=ends)
