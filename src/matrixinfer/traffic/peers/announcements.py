"""What is to be told of the prompts sent from here. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from matrixinfer.traffic.load import Charge
from matrixinfer.traffic.peers.message import MAX_PROMPTS, Load, Prompt, encode

REPEAT_SECONDS = 1.0
"""A prompt that is not computed yet is told again after so long: listeners assume it for some time only."""
AT_LEAST_EVERY_SECONDS = 1.0
"""A message is due, although nothing has changed."""


class Outgoing:
    """Collects prompts, equal ones once, and at most `MAX_PROMPTS`; further ones are dropped and counted."""

    def __init__(self, gateway: str) -> None:
        self.gateway = gateway
        self.dropped = 0
        """Prompts that were not told, or only the beginnings of."""
        self._entries: dict[Hashable, _Entry] = {}
        self._load: Mapping[str, Load] = {}
        self._told_at = float("-inf")

    def brings(self, endpoint: str, model: str, hashes: Sequence[int], start: int, charge: Charge) -> None:
        """A request goes to an endpoint, and brings it the blocks from `start` on."""
        self._add(Prompt(endpoint, model, False, hashes, start), lambda: charge.waits)

    def holds(self, endpoint: str, model: str, chain: Sequence[int]) -> None:
        """An endpoint whose events do not tell all has computed a prompt."""
        self._add(Prompt(endpoint, model, True, chain), lambda: False)

    def message(self, load: Mapping[str, Load], now: float) -> bytes | None:
        """What is to be published now; None while there is nothing new to tell."""
        ended = [key for key, entry in self._entries.items() if entry.told_at is not None and not entry.waits()]
        for key in ended:
            del self._entries[key]
        due = [entry for entry in self._entries.values() if entry.is_due(now)]
        if not due and load == self._load and now < self._told_at + AT_LEAST_EVERY_SECONDS:
            return None
        for entry in due:
            entry.told_at = now
        message, left_out = encode(self.gateway, load, [entry.prompt for entry in due])
        self.dropped += left_out
        self._load, self._told_at = dict(load), now
        return message

    def lost(self) -> None:
        """What was given out last has not been published, and what has come since is not worth telling late."""
        self.dropped += len(self._entries)
        self._entries.clear()
        self._load, self._told_at = {}, float("-inf")

    def _add(self, prompt: Prompt, waits: Callable[[], bool]) -> None:
        count = len(prompt.hashes)
        if prompt.start >= count:
            return
        # Two prompts of one key are equal or, where a block's name says nothing of those before it, nearly always are.
        key = (*prompt[:3], count, prompt.hashes[-1])
        if key in self._entries:
            self._entries[key].waits = waits
            return
        if len(self._entries) >= MAX_PROMPTS:
            told = next((key for key, entry in self._entries.items() if entry.told_at is not None), None)
            if told is None:
                self.dropped += 1
                return
            del self._entries[told]
        self._entries[key] = _Entry(prompt, waits)


class _Entry:
    __slots__ = ("prompt", "told_at", "waits")

    def __init__(self, prompt: Prompt, waits: Callable[[], bool]) -> None:
        self.prompt = prompt
        self.waits = waits
        self.told_at: float | None = None

    def is_due(self, now: float) -> bool:
        return self.told_at is None or now >= self.told_at + REPEAT_SECONDS
