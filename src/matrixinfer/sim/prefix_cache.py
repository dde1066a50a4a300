"""What an engine model needs of a prefix cache. `cache` behaves like vLLM's, `radix` like SGLang's."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from matrixinfer.blocks import TokenIds
from matrixinfer.sim import events, radix_events
from matrixinfer.sim.media import MediumRun

Event: TypeAlias = events.Event | radix_events.Event


class Adapter(NamedTuple):
    """A LoRA adapter. Blocks that were computed with it serve only requests with the same adapter."""

    number: int
    """Starts at 1."""
    name: str


class TokenSequence(Protocol):
    """One request's tokens, and its place in the cache."""

    tokens: array[int]

    def append(self, token: int) -> None:
        """Add a generated token."""
        ...


class Hit(Protocol):
    """The longest prefix of a sequence that the cache can reuse."""

    @property
    def tokens(self) -> int:
        """Length of the prefix."""
        ...


S = TypeVar("S", bound=TokenSequence)
H = TypeVar("H", bound=Hit)


class PrefixCache(Protocol, Generic[S, H]):
    """A cache in blocks of `block_size` tokens.

    A request calls `lookup`, `fits`, `allocate` for each step, `computed` when the step is done, and `release` at its end.
    """

    block_size: int

    @property
    def capacity(self) -> int:
        """Tokens that fit at the same time."""
        ...

    @property
    def usage(self) -> float:
        """Share of blocks that running requests use, 0 to 1. Blocks that are only cached do not count."""
        ...

    def sequence(
        self,
        tokens: TokenIds,
        salt: str | None = None,
        adapter: Adapter | None = None,
        extra_key: str | None = None,
        media: Items[MediumRun] = (),
    ) -> S:
        """A new sequence that holds nothing yet."""
        ...

    def new_step(self) -> bool:
        """A step begins. Returns whether something that did not fit may fit now, although nothing was released."""
        ...

    def chunk(self, sequence: S, start: int, count: int, most: int) -> int:
        """How many of the next `count` tokens after `start` one step computes; the largest step has `most` tokens."""
        ...

    def lookup(self, sequence: S) -> H:
        """Find the longest reusable prefix of `sequence`. Its last token is always computed."""
        ...

    def load(self, sequence: S, hit: H) -> int:
        """Tokens after the hit that a slower tier has and allocation will load back."""
        ...

    def report(self, sequence: S, hit: H) -> None:
        """Report the blocks of the hit, which are cached already, as if they were stored now."""
        ...

    def fits(self, sequence: S, hit: H) -> bool:
        """Whether all of `sequence` fits now, given what `lookup` found."""
        ...

    def allocate(self, sequence: S, computed: int, hit: H | None = None) -> bool:
        """Make room for the first `computed` tokens. `hit` is the result of `lookup`, for a sequence that holds nothing.

        Returns False when there is too little room.
        """
        ...

    def computed(self, sequence: S, tokens: int) -> None:
        """The first `tokens` tokens are computed."""
        ...

    def release(self, sequence: S, *, preempted: bool = False) -> None:
        """The request is finished, or starts again later. It holds nothing any more; the cache may keep what it computed."""
        ...

    def reset(self) -> bool:
        """Clear the cache. Returns False, and changes nothing, while any block is in use."""
        ...

    def take_events(self) -> list[Any]:
        """Return the events since the last call, in order."""
        ...
