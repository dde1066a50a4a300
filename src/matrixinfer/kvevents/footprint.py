"""How much one engine's cache holds on its device, and how much it has dropped, as its events report it."""

from __future__ import annotations


class Footprint:
    """Plain numbers that the ledger keeps up to date after each batch, for those who choose a pod."""

    __slots__ = ("evicted_tokens", "held_tokens", "most_tokens")

    def __init__(self) -> None:
        self.held_tokens = 0
        """Tokens of the distinct blocks that the cache holds, whether requests use them or not."""
        self.most_tokens = 0
        """The most that it has held. Once something was evicted, that is what it can hold."""
        self.evicted_tokens = 0
        """Tokens of the blocks that it has evicted so far."""

    @classmethod
    def of(cls, held: int, most: int, evicted: int) -> Footprint:
        """A footprint with these numbers, as another process has `reported` them."""
        made = cls()
        made.held_tokens, made.most_tokens, made.evicted_tokens = held, most, evicted
        return made

    def reported(self) -> tuple[int, int, int] | None:
        """The numbers in steps of a hundredth of the cache, so that they seldom change; None before the first block."""
        step = self.most_tokens // 100 or 1
        held, evicted = self.held_tokens // step * step, self.evicted_tokens // step * step
        return (held, self.most_tokens, evicted) if self.most_tokens else None

    def holds(self, tokens: int) -> None:
        """So many tokens are held now."""
        self.held_tokens = tokens
        if tokens > self.most_tokens:
            self.most_tokens = tokens

    def reset(self) -> None:
        """Expect another engine."""
        self.most_tokens = self.evicted_tokens = 0

    def capacity(self, reported: int | None) -> int | None:
        """Tokens that the cache can hold; None if that is unknown. `reported` is what the engine says.

        An engine that evicts is full, whatever it says: it may need a part of its memory for other things.
        """
        return self.most_tokens if self.evicted_tokens and self.most_tokens else reported
